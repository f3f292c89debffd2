"""TOMATO: 1,484 questions that need several frames in their order, of six kinds of reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import Benchmark
from storm_vlm.evaluation.benchmarks.published import (
    Entry,
    Hub,
    Videos,
    bare,
    lettered,
    read_entries,
)
from storm_vlm.evaluation.judge import equality_prompt


class Tomato(Benchmark):
    name = "tomato"
    title = "TOMATO"
    groups = ("reason_type", "demonstration_type")
    hub = Hub("lmms-eval/TOMATO")
    files = ("test*.parquet", "*tomato*.json*", "data/*.json")

    def entries(self, file: Path) -> Iterator[Entry]:
        """The hub's rows; or a file of the repository's `data`, {number: question}, in the same form."""
        for published in read_entries(file):
            if "question" in published:
                yield published
                continue
            for number, entry in published.items():  # numbers repeat from file to file
                yield {
                    "id": f"{file.stem}-{number}",
                    "video_path": f"{entry['demonstration_type']}/{entry['key']}.mp4",
                    "reason_type": entry["motion_type"],
                    **entry,
                }

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        options = bare(published["options"])
        return Row(
            id=str(published["id"]),
            video=videos.find(published["video_path"]),
            question=published["question"],
            options=options,
            answer=options[int(published["answer"])],  # an index, counted from 0
            split="test",
            meta={group: published[group] for group in self.groups},
        )

    def judge_prompt(self, text: str, row: Row) -> str | None:
        """Its authors have a judge read the letter of what their rule cannot read."""
        if self.official_score(text, row) is not None:
            return None
        return equality_prompt(row, text, lettered(row.options))

    def official_prompt(self, row: Row) -> str:
        """lmms-eval's, which has no number of frames in it as the authors' has."""
        options = dict(zip("ABCDEFGH", row.options, strict=False))
        return (
            "You will be provided with frames uniformly sampled from a video, the frames are provided in "
            "chronological order of the video. Analyze these frames and provide the answer to the question about "
            "the video content. Answer the multiple-choice question about the video content.\n\nYou must use these "
            "frames to answer the multiple-choice question; do not rely on any externel knowledge or commonsense. "
            f"\n\n<question> \n{row.question} \n</question>\n\n<options> \n{options} \n</options>\n\nEven if the "
            "information in these separate frames is not enough to answer the question, PLEASE TRY YOUR BEST TO "
            "GUESS AN ANSWER WHICH YOU THINK WOULD BE THE MOST POSSIBLE ONE BASED ON THE QUESTION. \n\nDO NOT "
            "GENERATE ANSWER SUCH AS 'NOT POSSIBLE TO DETERMINE.' \n"
        )
