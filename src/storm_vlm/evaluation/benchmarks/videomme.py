"""Video-MME: 2,700 questions about 900 videos of 11 seconds to an hour, without subtitles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import GENERAL, Benchmark
from storm_vlm.evaluation.benchmarks.published import (
    Entry,
    Hub,
    Videos,
    bare,
    index_of,
    read_entries,
)

# Of the authors' nested file, until it had the names of the hub's columns.
FORMER = {
    "duration_category": "duration",
    "video_category": "domain",
    "video_subcategory": "sub_category",
    "choices": "options",
}


class VideoMME(Benchmark):
    name = "videomme"
    title = "VideoMME"
    table = GENERAL
    groups = ("duration", "domain", "task_type")
    hub = Hub("lmms-lab/Video-MME")
    files = ("test-*.parquet", "*ideo*[mM][mM][eE]*.json*", "output_test_template.json")

    def entries(self, file: Path) -> Iterator[Entry]:
        """The hub's rows; or the authors' form for responses, videos with their `questions`, in the same form.

        There a video is named by its address, in the newest form by its number alone ("001").
        """
        for published in read_entries(file):
            if "questions" not in published:
                yield published
            for question in published.get("questions", ()):
                entry = {FORMER.get(k) or k: v for k, v in {**published, **question}.items()}
                id = re.search(r"[?&]v=([\w-]+)", entry.get("url", ""))
                yield {"videoID": id[1] if id else entry.get("video_id"), **entry}

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        options = bare(published["options"])
        return Row(
            id=published["question_id"],
            video=videos.find(published["videoID"], ("data", "videos")),
            question=published["question"],
            options=options,
            answer=options[index_of(published["answer"], options)],
            split="test",
            meta={
                **{group: published[group] for group in (*self.groups, "sub_category")},
                "published_options": published["options"],
            },
        )

    def official_prompt(self, row: Row) -> str:
        return (
            "Select the best answer to the following multiple-choice question based on the video. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n"
            f"{row.question}\n" + "\n".join(row.meta["published_options"]) + "\nThe best answer is:"
        )
