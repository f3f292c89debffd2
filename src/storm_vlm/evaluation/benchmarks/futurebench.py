"""FutureBench: what happens next, one to five events on; the film is seen up to there."""

from __future__ import annotations

import re

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare, index_of, lettered

FIRST = ("first_part_video", "first_segment_video")
OTHERS = ("video_dataset", "second_part_video")
_FOLDER = re.compile(rf".*?(?:{'|'.join(FIRST + OTHERS)})/|^\./")
_LISTED = re.compile(r"\s*\bA\)\s+.*\bD\)\s+.*", re.DOTALL)


class FutureBench(Benchmark):
    name = "futurebench"
    title = "FutureBench"
    groups = ("question_type",)
    hub = Hub("haonan3/V1-33K", data_files="futurebench.json", split="train")
    files = ("futurebench.json", "*futurebench*.json*")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """Rows name the whole film (`video_dataset/…`) and mean its first part, which has the same path.

        So a file counts only in the first parts' own folder: the whole film shows the answer.
        """
        asked, name = published["qa"], _FOLDER.sub("", published["video_path"])
        video = videos.find(name, FIRST, OTHERS)
        if not set(FIRST) & set(video.split("/")):
            video = str(videos.folder / FIRST[0] / name)
        options = bare([text for _, text in sorted(asked["Options"].items())])
        return Row(
            id=str(published["id"]),
            video=video,
            question=_LISTED.sub("", asked["Question"]),
            options=options,
            answer=options[index_of(asked["Answer"], options)],
            split="test",
            meta={
                "question_type": published["question_type"],
                "published_question": asked["Question"],
            },
        )

    def official_prompt(self, row: Row) -> str:
        """Some questions list the options themselves, as A) to D)."""
        question = row.meta["published_question"]
        if not _LISTED.search(question):
            question += f"\n{lettered(row.options)}".rstrip("\n")
        return f"\n{question}\n\nAnswer with the option's letter from the given choices directly."
