"""TempCompass: perception of action, direction, speed, order and change, asked in four ways.

Three can be matched (5,536 questions, `tempcompass`); captions need a judge (2,004, `tempcompass_captioning`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import GENERAL, Benchmark
from storm_vlm.evaluation.benchmarks.published import (
    Entry,
    Hub,
    Videos,
    bare,
    lettered,
    read_entries,
)
from storm_vlm.evaluation.judge import equality_prompt
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

    def entries(self, file: Path) -> Iterator[Entry]:
        """The hub's rows; or the repository's {video: {dim: [question, …]}}, in the same form."""
        for published in read_entries(file):
            if "question" in published:
                yield published
                continue
            for video, dims in published.items():
                for dim, questions in dims.items():
                    for number, entry in enumerate(questions):
                        place = {"place": f"{video}-{dim}-{number}", "video_id": video, "dim": dim}
                        yield entry | place

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        return _row(task, f"{task}-{published.get('place', number)}", videos, published)

    def official_prompt(self, row: Row) -> str:
        return row.meta["published_question"] + POST_PROMPTS[row.meta["task"]]

    def official_score(self, text: str, row: Row) -> float | None:
        """None: what the rules cannot match goes to a judge, as every caption does.

        A letter that answers our prompt, of options that may be permuted, is first put as the published option.
        """
        lines = row.meta["published_question"].split("\n")[1:]
        said = _published(text, row, lines)
        return tempcompass(said, row.meta["task"], row.meta["published_answer"], lines)

    def judge_prompt(self, text: str, row: Row) -> str | None:
        """Its authors ask about what their rules cannot match."""
        if self.official_score(text, row) is not None:
            return None
        lines = row.meta["published_question"].split("\n")[1:]
        permuted = row.options and _texts(row, lines) != row.options
        return equality_prompt(row, text, lettered(row.options) if permuted else "\n".join(lines))


class TempCompassCaptioning(TempCompass):
    """The captions. A judge answers a multiple-choice question from each; its right answer is the row's.

    The hub's rows bring that question. In the repository it is the first of the same video and dimension in
    `multi-choice.json`, as the authors' `eval_captioning.py` has it.
    """

    name = "tempcompass_captioning"
    title = "TempCompass, captions"
    table = None
    tasks = ("captioning",)
    hub = Hub("lmms-lab/TempCompass", tasks)

    def entries(self, file: Path) -> Iterator[Entry]:
        judged: dict[str, Entry] = {}
        for entry in super().entries(file):
            if "place" in entry:
                judged = judged or next(read_entries(file.with_name("multi-choice.json")))
                first = judged[entry["video_id"]][entry["dim"]][0]
                entry |= {"mc_question": first["question"], "mc_answer": first["answer"]}
            yield entry

    def judge_prompt(self, text: str, row: Row) -> str:
        """The judge does not know the right answer."""
        return (
            "Answer a multiple-choice question about a video from this description of it, and from nothing else.\n\n"
            f"Description: {text}\n\nQuestion: {row.meta['judge_question']}\n\n"
            'Write only JSON: {"choice": the letter of the only option that the description supports, "" if none}'
        )


def _published(text: str, row: Row, lines: list[str]) -> str:
    letter = re.fullmatch(r"([A-Z])(?:[.)].*)?", text.strip(), re.DOTALL)
    index = ord(letter[1]) - ord("A") if letter else len(row.options)
    if index >= len(row.options):
        return text
    if row.meta["task"] == "yes_no":
        return row.options[index]
    texts = _texts(row, lines)
    as_published = texts == row.options and not row.meta["labels"]
    return text if as_published else lines[texts.index(row.options[index])]


def _texts(row: Row, lines: list[str]) -> tuple[str, ...]:
    """The options in their published order, without labels."""
    if row.meta["labels"]:
        return tuple(line.partition(": ")[2] for line in lines)
    return bare(lines)


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
            **({"judge_question": published["mc_question"]} if task == "captioning" else {}),
        },
    )
