"""What importers share: reading objects one at a time, options and gold answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from storm_vlm.data.prompt import option_letter, parse_answer
from storm_vlm.errors import InputError, StormError

Fields = dict[str, Any]  #: of a `Row`; `video` as the source names it

_LABEL = re.compile(r"\s*(?:\(([A-Z])\)[:.]?|([A-Z])\s*[.):])\s*")
_HEADER = re.compile(r"\s*\b(?:options|choices)\s*:\s*\Z", re.IGNORECASE)


class Skipped(Exception):
    """An object that is not for us: counted by reason, and no fault of the source."""


def read_objects(path: Path) -> Iterator[Any]:
    """The members of a JSON list, or the lines of a JSONL file, one in memory at a time.

    Raises StormError that names the file, and the line of JSONL, where it is not JSON.
    """
    import ijson

    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if head.startswith(b"["):
            try:
                yield from ijson.items(file, "item", use_float=True)
            except (ijson.JSONError, UnicodeDecodeError) as error:
                raise StormError(
                    f"{path}: not a whole JSON list ({error}); copy it again"
                ) from error
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    raise StormError(f"{path}:{number}: not JSON ({error}); mend it") from error


def text_of(item: Fields, key: str) -> str:
    """A field that must be text. Raises ``ValueError``."""
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"no {key}: {value!r}")
    return value.strip()


def bare_options(options: Sequence[str]) -> list[str]:
    """Options without "A.", "A)", "(A)", "(A):" or "A:"; as they are unless all are labelled, in order.

    (So "A.M." and "P.M." keep their first letters.)
    """
    matches = [_LABEL.match(option) for option in options]
    labels = [(match[1] or match[2]) if match else None for match in matches]
    if labels == [option_letter(i) for i in range(len(options))]:
        options = [
            option[match.end() :] for option, match in zip(options, matches, strict=True) if match
        ]
    return [option.strip() for option in options]


def gold_option(answer: str, options: Sequence[str], originals: Sequence[str]) -> str:
    """The option that a gold answer means: its text, its letter, or both. Raises ``ValueError``."""
    answer = unwrapped(answer)
    for texts in (originals, options):
        letter = texts is options and re.fullmatch("[A-Z]", answer)  # of "A. B", "B. A": a label
        if answer in texts and not letter:
            return options[texts.index(answer)]
    index = parse_answer(answer, options)
    if index is None:
        raise InputError(f"answer is none of the options: {answer!r} of {list(originals)}")
    rest = _LABEL.sub("", answer, count=1) if _LABEL.match(answer) else ""
    if rest and not _folded(rest).startswith(_folded(options[index])):
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
    starts = [i for i, line in enumerate(lines) if (m := _LABEL.match(line)) and "A" in m.groups()]
    for start in reversed(starts):
        options: list[str] = []
        for line in lines[start:]:
            match = _LABEL.match(line)
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
