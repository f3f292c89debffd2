"""LVBench: 1,549 questions about 103 videos of half an hour to two hours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from storm_vlm.data.row import Row
from storm_vlm.datasets.parse import listed_choice
from storm_vlm.evaluation.benchmarks import Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, read_entries


class LVBench(Benchmark):
    """A question can be of several types; the authors count it for each, we for the combination."""

    name = "lvbench"
    title = "LVBench"
    groups = ("question_type", "type")
    hub = Hub("lmms-eval/LVBench", split="train")
    files = ("video_info.meta.jsonl", "*lvbench*.json*", "train*.parquet")

    def entries(self, file: Path) -> Iterator[Entry]:
        """lmms-eval's rows; or the authors' videos with their `qa`, in the same form."""
        for published in read_entries(file):
            for asked in published.get("qa", [{}]):
                yield {"video_path": f"{published['key']}.mp4", **published, **asked}

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """Options stand in the question, a line each: "(A) …". Where the answer is to be seen stays behind."""
        fields = listed_choice(published["question"], published["answer"])
        if not fields["options"]:
            raise ValueError("question: no options in lines of their own")
        return Row(
            id=str(published["uid"]),
            video=videos.find(published["video_path"], ("all_videos", "videos")),
            split="test",
            meta={
                "question_type": " + ".join(sorted(published["question_type"])),
                "type": published["type"],
                "published_question": published["question"],
            },
            **fields,
        )

    def official_prompt(self, row: Row) -> str:
        """lmms-eval's."""
        return f"{row.meta['published_question']}\nAnswer the question with the option letter"
