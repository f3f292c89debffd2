"""Video-MME: 2,700 questions about 900 videos of 11 seconds to an hour, without subtitles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import GENERAL, Benchmark
from storm_vlm.evaluation.benchmarks.published import Hub, Videos, bare, index_of, read_published
from storm_vlm.evaluation.scoring import videomme_lmms_eval


class VideoMME(Benchmark):
    name = "videomme"
    title = "VideoMME"
    table = GENERAL
    groups = ("duration", "domain", "task_type")
    hub = Hub("lmms-lab/Video-MME")

    def read(self, folder: Path) -> list[Row]:
        videos = Videos(folder)

        def convert(published: dict[str, Any], file: Path, number: int) -> Row:
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

        return read_published(
            folder, ("test-*.parquet", "*ideo*[mM][mM][eE]*.json*"), self.hub, convert
        )

    def official_prompt(self, row: Row) -> str:
        return (
            "Select the best answer to the following multiple-choice question based on the video. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n"
            f"{row.question}\n" + "\n".join(row.meta["published_options"]) + "\nThe best answer is:"
        )

    def official_score(self, text: str, row: Row) -> float:
        """lmms-eval's rule: Video-MME's own script could not be had."""
        return videomme_lmms_eval(text, row)
