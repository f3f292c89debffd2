"""What the task's YAML names. lmms-eval loads this file by its path, with storm_vlm installed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from storm_vlm.data.answer import is_correct
from storm_vlm.data.row import Row

Doc = dict[str, Any]


def text(doc: Doc, **_: Any) -> str:
    """The question as it is put."""
    return doc["text"]


def visual(doc: Doc) -> list[str]:
    """For models that know no conversations."""
    return [doc["video"]]


def messages(doc: Doc, **_: Any) -> list[dict[str, Any]]:
    """One user turn: the video, or the part of it that is asked about, then the question."""
    window = {"start_time": doc["start"], "end_time": doc["end"]}
    video = {"type": "video", "url": doc["video"], **window}
    return [{"role": "user", "content": [video, {"type": "text", "text": doc["text"]}]}]


def process(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """By the strict scorer; never raises, as lmms-eval would try again for minutes."""
    right = is_correct(results[0], Row.model_validate_json(doc["row"]))
    outcome = {"id": doc["id"], "video": doc["video"]}
    return {
        "accuracy": {**outcome, "score": float(bool(right))},
        "unparsed": {**outcome, "score": float(right is None)},
    }


def mean(outcomes: Sequence[dict[str, Any]]) -> float:
    """Over all questions."""
    return sum(outcome["score"] for outcome in outcomes) / len(outcomes)
