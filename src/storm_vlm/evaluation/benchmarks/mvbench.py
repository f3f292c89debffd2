"""MVBench, 20 temporal tasks of 200 questions; and TVBench, 10 such tasks that text or one frame cannot solve."""

from __future__ import annotations

from pathlib import Path

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import GENERAL, Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare, lettered, window

CLEVRER, PERCEPTION = ("clevrer/video_validation", "clevrer"), ("perception/videos", "perception")
CHARADES = ("star/Charades_segment", "star/Charades_v1_480", "star")  # cut before whole
FOLDERS = {
    "action_sequence": CHARADES,
    "action_prediction": CHARADES,
    "action_antonym": ("ssv2_video_mp4", "ssv2_video"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", "Moments_in_Time_Raw"),
    "unexpected_action": ("FunQA_test/test", "FunQA_test"),
    "object_existence": CLEVRER,
    "object_interaction": CHARADES,
    "object_shuffle": PERCEPTION,
    "moving_direction": CLEVRER,
    "action_localization": ("sta/sta_video_segment", "sta/sta_video", "sta"),
    "scene_transition": ("scene_qa/video", "scene_qa"),
    "action_count": PERCEPTION,
    "moving_count": CLEVRER,
    "moving_attribute": CLEVRER,
    "state_change": PERCEPTION,
    "fine_grained_pose": ("nturgbd_convert", "nturgbd"),
    "character_order": PERCEPTION,
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", "tvqa"),
    "counterfactual_inference": CLEVRER,
}
SOURCES = {folders[-1]: folders for folders in FOLDERS.values()}


class MVBench(Benchmark):
    name = "mvbench"
    title = "MVBench"
    table = GENERAL
    groups = ("task",)
    tasks = tuple(FOLDERS)
    hub = Hub("OpenGVLab/MVBench", tasks, split="train", revision="video")
    files = ("json/*.json", "*.json", "*.parquet")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """`start` and `end` hold for whole films, not for the cut clips.

        Sources give different videos the same name, so a file counts only in its own source's folder, or
        outside of all of them.
        """
        folders = FOLDERS[task]
        others = {part for hints in SOURCES.values() if hints != folders for part in hints}
        video = videos.find(published["video"], folders, sorted(others))
        whole = not any(part.endswith("_segment") for part in Path(video).parts)
        return _row(task, number, video, published, cut=whole)

    def official_prompt(self, row: Row) -> str:
        return _prompt(row)


class TVBench(Benchmark):
    name = "tvbench"
    title = "TVBench"
    groups = ("task",)
    tasks = (
        *("action_antonym", "action_count", "action_localization", "action_sequence"),
        *("object_count", "egocentric_sequence", "moving_direction", "object_shuffle"),
        *("scene_transition", "unexpected_action"),
    )
    hub = Hub("FunAILab/TVBench", tasks, split="train")
    files = MVBench.files
    WINDOWED = ("action_localization", "action_sequence")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """Two tasks ask about a stretch of a whole film: "at the end" is the end of that."""
        others = [other for other in self.tasks if other != task]
        video = videos.find(published["video"], (task,), others)
        return _row(task, number, video, published, cut=task in self.WINDOWED)

    def official_prompt(self, row: Row) -> str:
        return _prompt(row)


def _row(task: str, number: int, video: str, published: Entry, cut: bool) -> Row:
    name, options = f"{task}-{number}", bare(published["candidates"])
    start, end = window(published, name) if cut else (None, None)
    return Row(
        id=name,
        video=video,
        start=start,
        end=end,
        question=published["question"],
        options=options,
        answer=options[published["candidates"].index(published["answer"])],
        split="test",
        meta={"task": task, "published_options": published["candidates"]},
    )


def _prompt(row: Row) -> str:
    """MVBench's, and TVBench's too, without "Best option:(", with which the original begins the model's turn."""
    return (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
        "movement of objects, and the action and pose of persons. Based on your observations, select the "
        f"best option that accurately addresses the question.\nQuestion: {row.question}\nOptions:\n"
        f"{lettered(row.options, '({}) {}')}Only give the best option."
    )
