"""The training and evaluation row (paper section 3.2), one JSON object per line.

A file is self-contained: a relative path in it means "relative to the folder of this file", so a
data set can be moved or packed as one folder. Addresses ("https://…") are not read, but for "file://…".
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.json_objects import JSONError, scan_objects
from storm_vlm.errors import InputError

Split = Literal["train", "validation", "test", "ood"]
Seconds = Annotated[float, Field(ge=0, strict=True)]
ThoughtSource = Literal["oracle", "generated", "future", "keyframes"]
Slots = Annotated[int, Field(ge=1, strict=True)]
NonEmpty = Annotated[str, Field(pattern=r"\S")]


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError("no file's name has a zero byte")
    return value


FilePath = Annotated[NonEmpty, AfterValidator(_path)]


def _storable(value: Any) -> Any:
    """With null for NaN, which pandas writes for a missing value. Raises ValueError for an infinite number."""
    if isinstance(value, dict):
        return {key: _storable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(part) for part in value]
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("an infinite number")
    return None if isinstance(value, float) and math.isnan(value) else value


Free = Annotated[dict[str, Any], BeforeValidator(_storable)]  # what others wish to keep with a row
LABEL = re.compile(
    r"\s*(?:\(([A-Z])\)[:.]?|([A-Z])\s*[.):])\s*"
)  #: of an option: "A.", "A)", "(A)", "(A):", "A:"


class RowError(InputError):
    """A line of a row file that is not a valid :class:`Row`; names file, line and field."""


class ThoughtVideo(BaseModel):
    """The imagined clip whose visual tokens supervise the latent slots (paper section 3.2).

    ``source`` tells how it came about: rendered by a simulator (``oracle``), by a video generator
    (``generated``), cut from what follows the input clip (``future``), or the input's own
    ``keyframes``. ``provenance`` keeps what is needed to make it again (prompt, seed, revision).
    It is the whole file, or what the file shows from ``start`` to ``end``, in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: FilePath
    start: Seconds | None = None
    end: Seconds | None = None
    source: ThoughtSource
    generator: str
    provenance: Free = {}

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        _check_window(self.start, self.end)
        return self

    @model_serializer(mode="wrap")
    def _window_if_any(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A whole file is written, and hashed, as it was before there were windows."""
        whole = {name for name in ("start", "end") if getattr(self, name) is None}
        return {name: value for name, value in written(self).items() if name not in whole}


class Row(BaseModel):
    """One question about one video. Times are seconds from the start of the video file.

    With ``options``, ``answer`` is the text of exactly one of them; without, it is free text. A null is taken for a
    field that is left out, and labels come off options that have them ("A. red"): the prompt has its own.
    ``slots`` is how many latent slots its thought takes, where that is not the model's K but less.
    A row that gives away the unseen part is refused: its thought video must show more than the clip does, and no
    keyframe may come after the clip's end.
    Raises pydantic's ``ValidationError`` (a ``ValueError``) that names the offending field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: Literal[1] = 1
    id: NonEmpty
    video: FilePath
    start: Seconds | None = None
    end: Seconds | None = None
    question: NonEmpty
    options: tuple[NonEmpty, ...] = ()
    answer: NonEmpty
    keyframes: tuple[Seconds, ...] = ()
    plan: str | None = None
    thought_video: ThoughtVideo | None = None
    slots: Slots | None = None
    split: Split
    meta: Free = {}

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        options = fields.get("options")
        if isinstance(options, list | tuple) and all(isinstance(option, str) for option in options):
            bare = without_labels(options)
            if fields.get("answer") in options:
                fields["answer"] = bare[list(options).index(fields["answer"])]
            fields["options"] = bare
        return fields

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        _check_window(self.start, self.end)
        late = [time for time in self.keyframes if self.end is not None and time > self.end]
        if late:
            raise ValueError(
                f"keyframes at {late} s come after the clip's end ({self.end} s) and would give away what is "
                "unseen; leave them out, or correct end"
            )
        if (thought := self.thought_video) and self._shows(thought):
            raise ValueError(
                f"thought_video {thought.path} from {thought.start} to {thought.end} s lies within the clip that is "
                "seen, so there is nothing to be imagined; set end where the seen part ends, or name what follows"
            )
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"options must be distinct, got {self.options}")
        if self.options and self.answer not in self.options:
            raise ValueError(f"answer must be one of the options' texts, got {self.answer!r}")
        return self

    @model_serializer(mode="wrap")
    def _slots_if_any(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A row without is written, and hashed, as it was before there were any."""
        fields = written(self)
        if self.slots is None:
            del fields["slots"]
        return fields

    def _shows(self, thought: ThoughtVideo) -> bool:
        """Whether the clip is of the same file and leaves out none of the thought video."""
        same = os.path.normpath(self.video) == os.path.normpath(thought.path)
        begins = (self.start or 0) <= (thought.start or 0)
        ends = self.end is None or (thought.end is not None and thought.end <= self.end)
        return same and begins and ends


def _check_window(start: float | None, end: float | None) -> None:
    if start is not None and end is not None and start >= end:
        raise ValueError(f"start ({start}) must be less than end ({end})")


def without_labels(options: Sequence[str]) -> list[str]:
    """Options without their labels, if all have the right ones, in order; else as they are ("A.M.", "P.M.")."""
    matches = [LABEL.match(option) for option in options]
    labels = [match[1] or match[2] for match in matches if match]
    if not labels or labels != list(ascii_uppercase[: len(options)]):
        return list(options)
    return [option[match.end() :] for option, match in zip(options, matches, strict=True) if match]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a JSONL file or of a JSON list, paths made absolute. Blank lines are skipped.

    Raises RowError for the first malformed row or repeated id, ``OSError`` if the file cannot be read.
    """
    rows, faults = scan_rows(path)
    for place, fault in faults.items():
        raise RowError(f"{place}: {fault}")
    return rows


def scan_rows(path: str | os.PathLike[str]) -> tuple[list[Row], dict[str, str]]:
    """As `read_rows`; and what is wrong with lines that hold no row, or one whose id is taken, by "file:line".

    Raises JSONError for a file that is neither lines nor a whole list, and ``OSError``.
    """
    rows: list[Row] = []
    faults: dict[str, str] = {}
    for place, found in iter_rows(path):
        if isinstance(found, Row):
            rows.append(found)
        else:
            faults[place] = found
    return rows, faults


def iter_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Row | str]]:
    """As `scan_rows`, one at a time in memory: each row, or what is wrong, with its place."""
    folder = Path(path).absolute().parent
    places: dict[str, str] = {}
    for place, fields in scan_objects(path):
        if isinstance(fields, JSONError):
            yield place, str(fields).removeprefix(f"{place}: ")
            continue
        try:
            row = Row.model_validate(fields)
        except ValidationError as error:
            yield place, _explain(error)
            continue
        if row.id in places:
            yield place, f"id: {row.id!r} is taken by {places[row.id]}; rename one"
            continue
        places[row.id] = place
        yield place, _with_paths(row, lambda name: absolute(name, folder))


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write rows as JSONL in one step: readers see the old file or the whole new one.

    Absolute paths beneath the file's folder become relative to it; others are kept as they are.
    """
    path = Path(path).absolute()
    lines = (row_line(row, path.parent) for row in rows)
    with in_one_step(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(lines)  # one at a time: a data set need not fit into memory


def row_line(row: Row, folder: Path) -> str:
    """The line of a row in a file in ``folder`` (absolute)."""
    return (
        json.dumps(portable(row, folder).model_dump(), ensure_ascii=False, allow_nan=False) + "\n"
    )


def portable(row: Row, folder: Path) -> Row:
    """The row as a file in ``folder`` (absolute) holds it: paths beneath the folder relative to it."""

    def shorten(name: str) -> str:
        inside = Path(name).is_relative_to(folder)
        return Path(name).relative_to(folder).as_posix() if inside else name

    return _with_paths(row, shorten)


def absolute(name: str, folder: Path) -> str:
    """The path of a file that a row in `folder` names. An address stays one, for the error to come to name it."""
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://").removeprefix("localhost"))
    return name if "://" in name else os.path.normpath(folder / os.path.expanduser(name))


def _with_paths(row: Row, change: Callable[[str], str]) -> Row:
    thought = row.thought_video
    if thought is not None:
        thought = thought.model_copy(update={"path": change(thought.path)})
    return row.model_copy(update={"video": change(row.video), "thought_video": thought})


def _explain(error: ValidationError) -> str:
    faults: list[str] = []
    for fault in error.errors():
        field, message = (
            ".".join(map(str, fault["loc"])),
            fault["msg"].removeprefix("Value error, "),
        )
        if fault["type"] == "extra_forbidden":
            message = "a row has no such field; put your own into meta"
        elif not field and fault["type"] == "model_type":
            message = "a row is a JSON object, with braces"
        faults.append(f"{field or 'row'}: {message}")
    return "; ".join(faults)
