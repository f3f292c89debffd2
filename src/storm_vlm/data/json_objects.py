"""JSON as other programs write it: lines or a list, a byte order mark, `NaN`. One object at a time in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from storm_vlm.errors import AccessError, InputError

_CHUNK = 1 << 16  # characters read at a time
_PEEKED = 1 << 10  # characters in which a file of another kind has a zero byte
_END, _SEPARATOR = re.compile(r"\s*\]"), re.compile(r"\s*(?:,\s*|(?=\]))")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a character
_BYTE = re.compile("[\udc80-\udcff]")  # what a byte that is not UTF-8 is read as
_NOT_A_NUMBER = json.JSONDecoder()  # knows NaN and Infinity
_NULL = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))


class JSONError(InputError):
    """A file, or a part of one, that is not JSON: names the file, the line or item, and the remedy."""


def scan_objects(
    path: str | PathLike[str], decoder: json.JSONDecoder = _NOT_A_NUMBER
) -> Iterator[tuple[str, Any]]:
    """Each line of a JSONL file, or each member of a JSON list, with its place.

    A place is "file:line" or "file: item number". What is not JSON comes as the JSONError that says so.

    Raises:
        JSONError: the file is no text, or a list that is not whole.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        head = file.read(_CHUNK)
        if "\0" in head[:_PEEKED]:
            raise JSONError(f"{path}:1: not UTF-8 text: name a file of JSON, saved as UTF-8")
        if head.lstrip().startswith("["):
            yield from _scan_list(path, file, head.lstrip()[1:].lstrip(), decoder)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    value = _checked(decoder.decode(line.strip()), line)
                except (ValueError, RecursionError) as error:
                    value = _error(place, error)
                yield place, value


def read_objects(path: str | PathLike[str]) -> Iterator[tuple[str, Any]]:
    """As `scan_objects`, of a file that is JSON throughout; `NaN`, what pandas writes for a missing value, is null.

    Raises JSONError and OSError.
    """
    for place, value in scan_objects(path, _NULL):
        if isinstance(value, JSONError):
            raise value
        yield place, value


def read_json(path: str | PathLike[str]) -> Any:
    """The value that a file holds, `NaN` read as null. Raises JSONError and OSError."""
    try:
        with _opened(path) as file:
            text = file.read()
        return _checked(_NULL.decode(text.strip()), text)
    except (ValueError, RecursionError) as error:
        raise _error(str(path), error) from error


def _opened(path: str | PathLike[str]) -> TextIO:
    try:
        return Path(path).open(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise AccessError(f"{path}: no such file: check the path") from None


def _error(place: str, error: Exception) -> JSONError:
    if isinstance(error, UnicodeError):
        return JSONError(f"{place}: not UTF-8 text: save the file as UTF-8")
    return JSONError(f"{place}: not JSON ({error}): mend it, or copy it again")


def _scan_list(
    path: str | PathLike[str], file: TextIO, text: str, decoder: json.JSONDecoder
) -> Iterator[tuple[str, Any]]:
    """Of a list, from `text` and what follows in the file."""
    start, number = 0, 0
    while True:
        place = f"{path}: item {number + 1}"
        try:
            if end := _END.match(text, start):
                if (text[end.end() :] + file.read()).strip():
                    raise ValueError("there is text behind the end of the list")
                return
            value, stop = decoder.raw_decode(text, start)
            separator = _SEPARATOR.match(text, stop)
            if separator is None:
                raise ValueError("a comma is missing")
        except (ValueError, RecursionError) as error:
            more = file.read(max(_CHUNK, len(text)))
            if not more:
                raise _error(place, error) from error
            text, start = (text[start:] + more).lstrip(), 0
            continue
        try:
            value = _checked(value, text[start:stop])
        except ValueError as error:
            value = _error(place, error)
        yield place, value
        number, start = number + 1, separator.end()


def _checked(value: Any, text: str) -> Any:
    """The value of `text`. Raises ValueError for bytes that are no text, and for what no file could hold."""
    if _BYTE.search(text):
        text.encode()  # raises
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeError as error:
            raise ValueError("half a character") from error
    return value
