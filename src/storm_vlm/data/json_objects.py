"""JSON as other programs write it: lines or a list, with or without a byte order mark, `NaN` for what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from storm_vlm.errors import InputError

_CHUNK = 1 << 16  # characters read at a time
_END, _SEPARATOR = re.compile(r"\s*\]"), re.compile(r"\s*(?:,\s*|(?=\]))")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONError(InputError):
    """A file that is not JSON: names the file, the line or item, and the remedy."""


def read_objects(path: str | PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Each line of a JSONL file, or each member of a JSON list, with its place; one at a time in memory.

    A place is "file:line" or "file: item number". `NaN` is read as null. Raises JSONError and OSError.
    """
    place = str(path)
    with Path(path).open(encoding="utf-8-sig") as file:
        try:
            if (head := file.read(_CHUNK).lstrip()).startswith("["):
                members = _members(file, head[1:].lstrip())
                for number, member in enumerate(members, start=1):
                    yield f"{path}: item {number}", member
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path}:{number}"
                    yield place, _value(line)
        except (ValueError, RecursionError) as error:
            raise _error(place, path, error) from error


def read_json(path: str | PathLike[str]) -> Any:
    """The value that a file holds. Raises JSONError and OSError."""
    try:
        return _value(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _error(str(path), path, error) from error


def _error(place: str, path: str | PathLike[str], error: Exception) -> JSONError:
    if not isinstance(error, UnicodeDecodeError):
        return JSONError(f"{place}: not JSON ({error}): mend it, or copy it again")
    text = Path(path).read_text("utf-8", errors="replace")
    line = text.count("\n", 0, text.index("\N{REPLACEMENT CHARACTER}")) + 1
    return JSONError(f"{path}:{line}: not UTF-8 text ({error.reason}): save the file as UTF-8")


def _value(text: str) -> Any:
    return _checked(json.loads(text, parse_constant=_constant), text)


def _members(file: TextIO, text: str) -> Iterator[Any]:
    """Of a list, from `text` and what follows in the file. Raises ValueError where it is not whole."""
    decoder, place, number = json.JSONDecoder(parse_constant=_constant), 0, 0
    while True:
        try:
            if end := _END.match(text, place):
                if (text[end.end() :] + file.read()).strip():
                    raise ValueError("there is text behind the end of the list")
                return
            value, stop = decoder.raw_decode(text, place)
            separator = _SEPARATOR.match(text, stop)
            if separator is None:
                raise ValueError("a comma is missing")
        except ValueError as error:
            more = file.read(max(_CHUNK, len(text)))
            if not more:
                raise ValueError(f"the list breaks off behind item {number}: {error}") from error
            text, place = (text[place:] + more).lstrip(), 0
            continue
        number += 1
        yield _checked(value, text[place:stop])
        place = separator.end()


def _constant(name: str) -> None:
    """`NaN` is what pandas writes for a missing value; an infinite one is no value at all."""
    if name != "NaN":
        raise ValueError(f"{name} is no JSON number")


def _checked(value: Any, text: str) -> Any:
    """The value; raises ValueError for half a character, which no file could hold."""
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value
