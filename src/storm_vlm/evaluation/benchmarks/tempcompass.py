"""TempCompass: perception of action, direction, speed, order and change, asked in four ways.

Three can be matched (5,536 questions, `tempcompass`); captions need a judge (2,004, `tempcompass_captioning`).
"""

from __future__ import annotations

from typing import ClassVar

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import GENERAL, Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare
from storm_vlm.evaluation.scoring import tempcompass

POST_PROMPTS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",
}


class TempCompass(Benchmark):
    """Yes or no, and which caption matches, are posed as options, so that one scorer serves all."""

    name = "tempcompass"
    title = "TempCompass"
    table: ClassVar[str | None] = GENERAL
    groups = ("task", "dim")
    tasks = ("multi-choice", "yes_no", "caption_matching")
    hub = Hub("lmms-lab/TempCompass", tasks)
    files = ("questions/*.json", "*.json", "*.parquet")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> list[Row]:
        return [
            _row(task, f"{task}-{number}{place}", videos, flat) for place, flat in _flat(published)
        ]

    def official_prompt(self, row: Row) -> str:
        return row.meta["published_question"] + POST_PROMPTS[row.meta["task"]]

    def official_score(self, text: str, row: Row) -> float | None:
        """None: what the rules cannot match goes to a judge, as every caption does."""
        lines = row.meta["published_question"].split("\n")[1:]
        return tempcompass(text, row.meta["task"], row.meta["published_answer"], lines)


class TempCompassCaptioning(TempCompass):
    """The captions."""

    name = "tempcompass_captioning"
    title = "TempCompass, captions"
    table = None
    tasks = ("captioning",)
    hub = Hub("lmms-lab/TempCompass", tasks)


def _flat(published: Entry) -> list[tuple[str, Entry]]:
    """One row of the hub; or the repository's {video: {dim: [question, …]}}."""
    if "question" in published:
        return [("", published)]
    return [
        (f"-{video}-{dim}-{i}", {**entry, "video_id": video, "dim": dim})
        for video, dims in published.items()
        for dim, questions in dims.items()
        for i, entry in enumerate(questions)
    ]


def _row(task: str, name: str, videos: Videos, published: Entry) -> Row:
    text, labels = published["question"], ()
    answer = published["mc_answer"] if task == "captioning" else published["answer"]
    question, options = text, ()
    if task == "yes_no":
        options, gold = ("yes", "no"), answer
    elif task == "captioning":
        gold = answer
    else:
        question, *lines = text.split("\n")
        if answer not in lines:
            raise ValueError(f"answer: {answer!r} is none of the lines after the question")
        options = bare(lines)
        if task == "caption_matching":
            labels, _, options = zip(*(line.partition(": ") for line in lines), strict=True)
        gold = options[lines.index(answer)]
    return Row(
        id=name,
        video=videos.find(published["video_id"], ("videos",)),
        question=question,
        options=options,
        answer=gold,
        split="test",
        meta={
            "task": task,
            "dim": published["dim"],
            "labels": list(labels),
            "published_question": text,
            "published_answer": answer,
        },
    )
