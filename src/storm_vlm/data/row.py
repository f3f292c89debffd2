"""The training and evaluation row (paper section 3.2), one JSON object per line.

A file is self-contained: a relative path in it means "relative to the folder of this file", so a
data set can be moved or packed as one folder. Addresses ("https://…") are not read.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.errors import StormError

Split = Literal["train", "validation", "test", "ood"]
Seconds = Annotated[float, Field(ge=0)]
ThoughtSource = Literal["oracle", "generated", "future", "keyframes"]
NonEmpty = Annotated[str, Field(pattern=r"\S")]


class RowError(StormError, ValueError):
    """A line of a row file that is not a valid :class:`Row`; names file, line and field."""


class ThoughtVideo(BaseModel):
    """The imagined clip whose visual tokens supervise the latent slots (paper section 3.2).

    ``source`` tells how it came about: rendered by a simulator (``oracle``), by a video generator
    (``generated``), cut from what follows the input clip (``future``), or the input's own
    ``keyframes``. ``provenance`` keeps what is needed to make it again (prompt, seed, revision).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: NonEmpty
    source: ThoughtSource
    generator: str
    provenance: dict[str, Any] = {}


class Row(BaseModel):
    """One question about one video. Times are seconds from the start of the video file.

    With ``options``, ``answer`` is the text of exactly one of them; without, it is free text.
    Raises pydantic's ``ValidationError`` (a ``ValueError``) that names the offending field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: Literal[1] = 1
    id: NonEmpty
    video: NonEmpty
    start: Seconds | None = None
    end: Seconds | None = None
    question: NonEmpty
    options: tuple[NonEmpty, ...] = ()
    answer: NonEmpty
    keyframes: tuple[Seconds, ...] = ()
    plan: str | None = None
    thought_video: ThoughtVideo | None = None
    split: Split
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError(f"start ({self.start}) must be less than end ({self.end})")
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"options must be distinct, got {self.options}")
        if self.options and self.answer not in self.options:
            raise ValueError(f"answer must be one of the options' texts, got {self.answer!r}")
        return self


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a JSONL file, paths made absolute. Blank lines are skipped.

    Raises :class:`RowError` on the first malformed line or repeated id, ``OSError`` if the file
    cannot be read.
    """
    path = Path(path)
    folder = path.absolute().parent
    rows: list[Row] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            raise RowError(f"{path}:{number}: {_explain(error)}") from error
        if row.id in line_of_id:
            first = line_of_id[row.id]
            raise RowError(f"{path}:{number}: id: {row.id!r} is taken by line {first}; rename one")
        line_of_id[row.id] = number
        rows.append(_with_paths(row, lambda name: _absolute(name, folder)))
    return rows


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write rows as JSONL in one step: readers see the old file or the whole new one.

    Absolute paths beneath the file's folder become relative to it; others are kept as they are.
    """
    path = Path(path).absolute()
    dumped = (portable(row, path.parent).model_dump() for row in rows)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in dumped)
    with in_one_step(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(lines)  # one at a time: a data set need not fit into memory


def portable(row: Row, folder: Path) -> Row:
    """The row as a file in ``folder`` (absolute) holds it: paths beneath the folder relative to it."""

    def shorten(name: str) -> str:
        inside = Path(name).is_relative_to(folder)
        return Path(name).relative_to(folder).as_posix() if inside else name

    return _with_paths(row, shorten)


def _absolute(name: str, folder: Path) -> str:
    """An address stays one, for the error to come to name it."""
    return name if "://" in name else os.path.normpath(folder / os.path.expanduser(name))


def _with_paths(row: Row, change: Callable[[str], str]) -> Row:
    thought = row.thought_video
    if thought is not None:
        thought = thought.model_copy(update={"path": change(thought.path)})
    return row.model_copy(update={"video": change(row.video), "thought_video": thought})


def _explain(error: ValidationError) -> str:
    faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
    return "; ".join(f"{field or 'row'}: {message}" for field, message in faults)
