"""What the importers share: reading objects one at a time, options and gold answers, conversations.

An importer is a function from one object of the source to the fields of its rows. It raises :class:`Skipped` for
an object that is fine but not for us (an image question), ``ValueError`` for one that is wrong. The text of either
before its first colon is the reason that is counted; what comes after is the detail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from storm_vlm.data.prompt import option_letter, parse_answer
from storm_vlm.data.row import Row

Fields = dict[str, Any]  #: of a `Row`; `video` as the source names it

_LABEL = re.compile(r"\s*(?:\(([A-Z])\)[:.]?|([A-Z])\s*[.):])\s*")
_PLACEHOLDER = re.compile(r"<(?:video|image)>")
_HEADER = re.compile(r"\s*\b(?:options|choices)\s*:\s*\Z", re.IGNORECASE)
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    "system": "system",
}


class Skipped(Exception):
    """An object that is not for us: counted by reason, and no fault of the source."""


def read_objects(path: Path) -> Iterator[Any]:
    """The members of a JSON list, or the lines of a JSONL file, one in memory at a time.

    Raises ``ValueError`` that names the file, and the line of JSONL, where it is not JSON.
    """
    import ijson

    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if head.startswith(b"["):
            try:
                yield from ijson.items(file, "item", use_float=True)
            except (ijson.JSONError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path}: not a whole JSON list ({error}); copy it again"
                ) from error
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error}); mend it") from error


def text_of(item: Fields, key: str) -> str:
    """A field that must be text. Raises ``ValueError``."""
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {key}: {value!r}")
    return value.strip()


def bare_options(options: Sequence[str]) -> list[str]:
    """Options without "A.", "A)", "(A)", "(A):" or "A:"; as they are unless all are labelled, in order.

    (So "A.M." and "P.M." keep their first letters.)
    """
    found = [_LABEL.match(option) for option in options]
    labels = [(match[1] or match[2]) if match else None for match in found]
    if labels == [option_letter(i) for i in range(len(options))]:
        options = [
            option[match.end() :] for option, match in zip(options, found, strict=True) if match
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
        raise ValueError(f"answer is none of the options: {answer!r} of {list(originals)}")
    rest = _LABEL.sub("", answer, count=1) if _LABEL.match(answer) else ""
    if rest and not _folded(rest).startswith(_folded(options[index])):
        raise ValueError(f"answer's letter and text disagree: {answer!r} of {list(originals)}")
    return options[index]


def unwrapped(text: str, tag: str = "answer") -> str:
    """What stands inside the last <answer></answer>, or all of a text without one."""
    return re.split(f"</{tag}>", re.split(f"<{tag}>", text)[-1])[0].strip()


def choice(question: str, options: Sequence[str], answer: str) -> Fields:
    """Question, options and answer as a row has them. Raises ``ValueError``."""
    bare = bare_options(options)
    if len(set(bare)) < len(bare) or not all(bare):
        raise ValueError(f"options repeat or are empty: {list(options)}")
    gold = gold_option(answer, bare, options) if bare else unwrapped(answer)
    return {"question": question, "options": bare, "answer": gold}


def said_choice(question: str, answer: str) -> Fields:
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


def conversation_rows(item: Fields, turns: Any, video: str, placeholders: range) -> list[Fields]:
    """One row for each question and reply about one video.

    A later question is asked without the turns before it; `meta.turn` tells which those are. ``placeholders``: how
    many `<video>` (or `<image>`, as LLaVA writes for a video) the conversation may hold. A reply's <think> is the
    plan. Raises ``ValueError``.
    """
    spoken = [_turn(turn) for turn in turns if turn] if isinstance(turns, list) else []
    system = [text for role, text in spoken if role == "system"]
    spoken = [(role, text) for role, text in spoken if role != "system"]
    if not spoken or [role for role, _ in spoken] != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(f"turns are not question and reply: {[role for role, _ in spoken]}")
    count = sum(len(_PLACEHOLDER.findall(text)) for role, text in spoken if role == "user")
    if count not in placeholders:
        raise ValueError(f"placeholders do not match the videos: {count} for 1 video")
    rows: list[Fields] = []
    for number, ((_, asked), (_, reply)) in enumerate(zip(spoken[::2], spoken[1::2], strict=True)):
        thought = unwrapped(reply, "think") if "<think>" in reply else None
        stated = reply if "<answer>" in reply else re.split("</think>", reply)[-1]
        fields = said_choice(_PLACEHOLDER.sub("", asked), stated)
        meta: Fields = {"original": {"question": asked, "answer": reply}}
        if system:
            meta["system"] = "\n".join(system)
        if len(spoken) > 2:
            meta |= {"turn": number, "turns": len(spoken) // 2}
        suffix = f"/{number}" if number else ""
        row = fields | {"video": video, "plan": thought or None, "meta": meta}
        rows.append(row | ({"id": f"{item['id']}{suffix}"} if item.get("id") else {}))
    return rows


def one_video(item: Fields) -> str:
    """The video of an object with `videos` or `video`. Raises :class:`Skipped` unless there is exactly one file."""
    found = item.get("videos") or item.get("video") or []
    videos = found if isinstance(found, list) else [found]
    if not videos:
        raise Skipped("image row" if item.get("images") or item.get("image") else "text row")
    if len(videos) > 1 or item.get("images"):
        raise Skipped("several videos or images")
    if not isinstance(videos[0], str):
        raise Skipped("video given as frames")
    return videos[0]


def recorded(item: Fields, export: Any) -> Fields | None:
    """The row that our own exporter wrote along, if it still says what the rest of the object says."""
    if "storm" not in item:
        return None
    row = Row.model_validate_json(item["storm"])
    if any(item.get(key) != value for key, value in export(row).items()):
        raise ValueError("edited beside its `storm` record: delete the record, or edit both")
    return row.model_dump()


def _turn(turn: Any) -> tuple[str, str]:
    role = turn.get("role") or turn.get("from")
    text = turn.get("content", turn.get("value"))
    if role not in _ROLES or not isinstance(text, str):
        raise ValueError(f"turn by {role!r} or without text: {str(turn)[:200]}")
    return _ROLES[role], text


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
