"""Questions whose thought video is the real future: TwiFF-2.7M, Future-L1-50K and V1-33K.

Layouts as their own loaders read them: github.com/LiuJunhua02/TwiFF (e25c415), OpenGVLab/Future-L1 (a91add2),
sail-sg/Video-Next-Event-Prediction. Nothing of the future is in the question or the plan's keyframes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from storm_vlm.data.video import frame_times
from storm_vlm.datasets.conversations import llama_factory_rows
from storm_vlm.datasets.parse import Fields, Skipped, text_of, unwrapped
from storm_vlm.errors import InputError

RULE = "frames 1 to 8: the second, the second last, and the middles of six stretches between them"
_LABEL = re.compile(r"(?:frame_\d+\s*)?<image>\s*")
_THOUGHT = re.compile(r"^\s*THOUGHT \d+:\s*", re.MULTILINE)
_TREE = re.compile(r"^.*?(?:video_dataset|first_part_video)/")


def twiff_rows(item: Fields) -> list[Fields]:
    """`frames` are seen, `recon_frames` imagined; the answer stands in <ans> at the end of the thoughts."""
    question, reply = _exchange(item)
    if "<ans>" not in reply:
        raise InputError("no <ans> in the reply")
    thoughts = re.sub(r"<ans>.*", "", reply, flags=re.DOTALL)
    seen, imagined = item.get("frames"), item.get("recon_frames")
    _counted(seen, question.count("<image>"), "frames")
    _counted(imagined, reply.count("<rimage>"), "recon_frames")
    answer = unwrapped(reply, "ans")
    return [_row("twiff", item, question, answer, thoughts.replace("<rimage>", ""), seen, imagined)]


def future_l1_rows(item: Fields) -> list[Fields]:
    """As TwiFF's, under other names and with an `answer` of its own; the file's plain chats are rows, too."""
    if "reasoning_image" not in item:
        return llama_factory_rows(item)
    question, reply = _exchange(item)
    seen, imagined = item.get("image"), item["reasoning_image"]
    _counted(seen, question.count("<image>"), "image")
    _counted(imagined, reply.count("<image>"), "reasoning_image")
    thoughts = item.get("cot") or re.sub(r"<answer>.*", "", reply, flags=re.DOTALL)
    thoughts = _THOUGHT.sub("", _LABEL.sub("", thoughts))
    answer = item.get("answer") or (reply if "<answer>" in reply else None)
    if not isinstance(answer, str):
        raise InputError(f"no answer: {answer!r}")
    return [_row("future-l1", item, question, unwrapped(answer), thoughts, seen, imagined)]


def v1_33k_rows(item: Fields) -> list[Fields]:
    """The first part of a video is asked about, the second is the thought video; both are files."""
    if "qa" in item:
        raise Skipped("FutureBench's question: it is no training row")
    name = _TREE.sub("", text_of(item, "video_path"))
    captions = item.get("video_split", {}).get("split_caption", {})
    reasoning = item.get("ds_reasoning") or {}
    thought = {"path": f"second_part_video/{name}", "source": "future", "generator": "v1-33k"}
    row = {
        "video": f"first_part_video/{name}",
        "question": "What happens next?",
        "answer": text_of(captions, "caption_part2"),
        "plan": (reasoning.get("rewritten_reasoning_content") or "").strip() or None,
        "thought_video": thought,
        "meta": {"source": "V1-33K", "seen": captions.get("caption_part1")},
    }
    return [row | ({"id": f"v1-33k-{item['id']}"} if item.get("id") else {})]


def eight_frames(count: int) -> list[int]:
    """Which frames, from 0, of a clip of ``count`` frames TwiFF numbers 1 to 8.

    Future-L1's reinforcement learning numbers others (evenly from the second to the second last), its SFT these.
    """
    first = 0 if count <= 2 else 1
    last = count - 2 if count - 2 > first else count - 1
    stretches = min(6, last - first)
    cuts = np.linspace(first + 1, last, stretches + 1).astype(int).tolist()
    inner = [(a + b - 1) // 2 for a, b in pairwise(cuts)]
    chosen = [first, *inner, last]
    return chosen + [last] * (8 - len(chosen))


def future_fields(path: str, seen: Sequence[int], imagined: Sequence[int], name: str) -> Fields:
    """Window, keyframes and thought video of a clip, to the frame, by the numbers (1 to 8) of frames.

    The clip ends half-way to the frame behind the last one that is seen; from there to the last imagined one goes the
    thought video. Raises ``ValueError`` where an imagined frame is not later than all seen ones, and VideoError.
    """
    times = frame_times(path)
    eight = eight_frames(len(times))
    now, later = max(eight[i - 1] for i in seen), [eight[i - 1] for i in imagined]
    if min(later) <= now:
        raise InputError(
            f"imagined frames are seen already: {list(imagined)} of {list(seen)}, {len(times)} frames"
        )
    ends = [*((a + b) / 2 for a, b in pairwise(times)), None]
    provenance = {
        "frames": list(seen),
        "imagined": list(imagined),
        "times": [round(times[i], 6) for i in later],
        "frames_of_8": RULE,
    }
    thought = {"path": path, "start": ends[now], "end": ends[max(later)], "source": "future"}
    return {
        "end": ends[now],
        "keyframes": sorted(times[eight[i - 1]] for i in set(seen)),
        "thought_video": thought | {"generator": name, "provenance": provenance},
    }


def _row(
    name: str, item: Fields, question: str, answer: str, thoughts: str, seen: Any, imagined: Any
) -> Fields:
    row = {
        "video": text_of(item, "video"),
        "question": _LABEL.sub("", question).strip(),
        "answer": answer,
        "plan": re.sub(r"\s*\n\s*", "\n", thoughts).strip() or None,
        "of_video": lambda path: future_fields(path, seen, imagined, name),
        "meta": {"source": name},
    }
    return row | ({"id": f"{name}-{item['id']}"} if item.get("id") else {})


def _exchange(item: Fields) -> tuple[str, str]:
    """The one question and the one reply."""
    turns = item.get("conversations") or []
    if isinstance(turns, dict):  # of lists, as arrow folders have it
        turns = [
            {"from": a, "value": b} for a, b in zip(turns["from"], turns["value"], strict=True)
        ]
    turns = [turn for turn in turns if turn.get("from") != "system"]
    if [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise InputError(
            f"turns are not one question and one reply: {[t.get('from') for t in turns]}"
        )
    return turns[0]["value"], turns[1]["value"]


def _counted(numbers: Any, placeholders: int, name: str) -> None:
    if not isinstance(numbers, list) or not numbers or len(numbers) != placeholders:
        raise InputError(f"{name} do not match the placeholders: {numbers} for {placeholders}")
    if not all(isinstance(number, int) and 1 <= number <= 8 for number in numbers):
        raise InputError(f"{name} are not numbers from 1 to 8: {numbers}")
