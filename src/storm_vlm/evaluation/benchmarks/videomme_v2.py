"""Video-MME-v2: 3,200 questions with eight options about 800 videos, four a video, scored together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare, index_of
from storm_vlm.evaluation.records import Record

# What a chain of four questions earns by how many from the first on are right, in parts of the last.
CHAINS = {
    "[1,2,3,4]": (0, 1, 4, 9, 16),
    "[1,[2,3],4]": (0, 1, 4, 7, 12),
    "[[1,2],3,4]": (0, 1, 2, 5, 10),
}


class VideoMMEv2(Benchmark):
    name = "videomme_v2"
    title = "Video-MME-v2"
    groups = ("level", "group_type", "group_structure", "second_head", "third_head")
    hub = Hub("MME-Benchmarks/Video-MME-v2")
    files = ("test.parquet", "test-*.parquet", "*ideo*[mM][mM][eE]*2*.json*")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """Options are one text, a line each ("A. …"); a category that a question has none of is left out."""
        options = bare(re.split(r"\n(?=[A-H][.:)])", published["options"].strip()))
        groups = {name: published.get(name) for name in self.groups}
        return Row(
            id=published["question_id"],
            video=videos.find(str(published["video_id"]), ("videos", "data")),
            question=published["question"],
            options=options,
            answer=options[index_of(published["answer"], options)],
            split="test",
            meta={
                **{name: str(value) for name, value in groups.items() if value is not None},
                "published_options": published["options"],
            },
        )

    def official_figure(self, scores: Sequence[float], records: Sequence[Record]) -> float:
        """What each video's four answers earn together, on average; the plain mean where some are left out.

        They are in a run of some rows, and in categories that part a video's questions.
        """
        groups: dict[str, list[tuple[str, float, str]]] = {}
        for score, record in zip(scores, records, strict=True):
            structure = record.groups.get("group_structure", "")
            groups.setdefault(record.video, []).append((record.id, score, structure))
        if any(len(group) != 4 for group in groups.values()):
            return super().official_figure(scores, records)
        return mean(
            group_score([score == 1 for _, score, _ in sorted(group)], group[0][2])
            for group in groups.values()
        )

    def official_prompt(self, row: Row) -> str:
        """lmms-eval's; the authors have "These are the frames of a video." before it."""
        return (
            f"Question: {row.question}\n{row.meta['published_options']}\n"
            "Select the best answer to the following multiple-choice question based on the video. Respond with only "
            "the letter (A, B, C, D, E, F, G, or H) of the correct option."
        )


def group_score(right: list[bool], structure: str) -> float:
    """What a video's four answers earn together, 0 to 1; ``structure``: as the benchmark writes it.

    Of questions on one matter ("4"): the square of the share that is right. Of a chain: only what is right from its
    first question on counts, and of two questions side by side the second may stand in for the first.
    """
    parts = CHAINS.get(structure.replace(" ", ""))
    if parts is None:
        return (sum(right) / 4) ** 2
    streak = next((i for i, answer in enumerate(right) if not answer), 4)
    stands_in = {"[1,[2,3],4]": (1, 2), "[[1,2],3,4]": (0, 1)}.get(structure.replace(" ", ""))
    if stands_in and streak == stands_in[0] and right[stands_in[1]]:
        streak += 1
    return parts[streak] / parts[-1]
