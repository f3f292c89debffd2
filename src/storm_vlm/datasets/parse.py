"""What importers share: options and gold answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from storm_vlm.data.answer import parse_answer
from storm_vlm.data.prompt import option_letter
from storm_vlm.data.row import LABEL, without_labels
from storm_vlm.errors import InputError

Fields = dict[str, Any]  #: of a `Row`; `video` as the source names it

_HEADER = re.compile(r"\s*\b(?:options|choices)\s*:\s*\Z", re.IGNORECASE)


class Skipped(Exception):
    """An object that is not for us: counted by reason, and no fault of the source."""


def text_of(item: Fields, key: str) -> str:
    """A field that must be text. Raises ``ValueError``."""
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"no {key}: {value!r}")
    return value.strip()


def file_name(video: str) -> str:
    """The name of a video's file. Raises ``ValueError`` for an address and for the video itself in base64."""
    if video.startswith("data:") or len(video) > 4096:  # longer than a path can be
        raise InputError(f"video is base64: write it to a file first: {video[:40]}…")
    if "://" in video and not video.startswith("file://"):
        raise InputError(f"video is an address: download it first: {video}")
    return video


def bare_options(options: Sequence[str]) -> list[str]:
    """Options without their labels and without white space around them."""
    return [option.strip() for option in without_labels(options)]


def gold_option(answer: str, options: Sequence[str], originals: Sequence[str]) -> str:
    """The option that a gold answer means: its text, its letter, or both. Raises ``ValueError``."""
    answer = unwrapped(answer)
    for texts in (originals, options):
        letter = texts is options and re.fullmatch("[A-Z]", answer)  # of "A. B", "B. A": a label
        if answer in texts and not letter:
            return options[texts.index(answer)]
    index = parse_answer(answer, options)
    rest = _folded(LABEL.sub("", answer, count=1)) if LABEL.match(answer) else ""
    if index is None and rest not in map(_folded, options):
        raise InputError(f"answer is none of the options: {answer!r} of {list(originals)}")
    if index is None or not rest.startswith(_folded(options[index]) if rest else ""):
        raise InputError(f"answer's letter and text disagree: {answer!r} of {list(originals)}")
    return options[index]


def unwrapped(text: str, tag: str = "answer") -> str:
    """What stands inside the last <answer></answer>, or all of a text without one."""
    return re.split(f"</{tag}>", re.split(f"<{tag}>", text)[-1])[0].strip()


def choice(question: str, options: Sequence[str], answer: str) -> Fields:
    """Question, options and answer as a row has them. Raises ``ValueError``."""
    bare = bare_options(options)
    if len(set(bare)) < len(bare) or not all(bare):
        raise InputError(f"options repeat or are empty: {list(options)}")
    gold = gold_option(answer, bare, options) if bare else unwrapped(answer)
    return {"question": question, "options": bare, "answer": gold}


def listed_choice(question: str, answer: str) -> Fields:
    """The same for a question that lists its options in lines of text, if it does.

    At most one line may follow the options: how to answer. Our own prompt says that in its own words.
    """
    lines = question.strip().split("\n")
    starts = [i for i, line in enumerate(lines) if (m := LABEL.match(line)) and "A" in m.groups()]
    for start in reversed(starts):
        options: list[str] = []
        for line in lines[start:]:
            match = LABEL.match(line)
            if not match or option_letter(len(options) % 26) not in match.groups():
                break
            options.append(line)
        after = [line for line in lines[start + len(options) :] if line.strip()]
        stem = _HEADER.sub("", "\n".join(lines[:start])).strip()
        if len(options) > 1 and len(after) < 2 and stem:
            return choice(stem, options, answer)
    return choice(question.strip(), (), answer)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
