"""Which rows cannot be worked on, found out before the first is: one odd row must not end a long run.

Faults are reasons: of a row by its id, of a line that holds no row by its place, "file:line".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from operator import length_hint
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from storm_vlm.data.json_objects import scan_objects
from storm_vlm.data.prompt import (
    PromptError,
    answer_text,
    question_text,
)
from storm_vlm.data.row import Row, RowError, iter_rows, scan_rows
from storm_vlm.data.thread_pool import completed, thread_pool
from storm_vlm.data.video import VideoError, video_shape

NAMED = 10  # faults that a message lists
log = logging.getLogger(__name__)


class RowFile:
    """The rows of a file, or those that `holds` takes, read anew each time: in memory is one, however many they are.

    `malformed`: what is wrong with lines that hold no row, by "file:line".

    Raises:
        RowError: there are only such lines; later, that the file has changed.
        JSONError, OSError: it cannot be read.
    """

    def __init__(self, file: str | Path, holds: Callable[[Row], bool] = lambda _: True) -> None:
        self.file, self._holds = file, holds
        self.malformed: dict[str, str] = {}
        self._version = self._seen()
        self._count = sum(map(holds, self._all()))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        yield from filter(self._holds, self._all())
        if self._seen() != self._version:
            raise RowError(f"{self.file} has changed since the work began: run it again")

    def _all(self) -> Iterator[Row]:
        empty = True
        for place, found in iter_rows(self.file):
            if isinstance(found, Row):
                empty = False
                yield found
            else:
                self.malformed[place] = found
        if empty and self.malformed:
            raise RowError(f"{self.file} holds no row:\n{fault_lines(self.malformed, self.file)}")

    def _seen(self) -> tuple[int, int]:
        state = os.stat(self.file)
        return state.st_mtime_ns, state.st_size


def check_text(row: Row) -> None:
    """Raises PromptError: a control token, or too many options."""
    question_text(row.question, row.options)
    answer_text(row)


def check_video(row: Row) -> int:
    """Pixels of a frame, as the header has them.

    Raises PromptError as `check_text`, and VideoError: a header that cannot be read, a picture too thin, a window
    behind the video's end.
    """
    check_text(row)
    _, height, width = video_shape(row.video, row.start)
    return height * width


def check_videos(row: Row) -> None:
    """The thought video's, too."""
    check_video(row)
    if (thought := row.thought_video) is not None:
        video_shape(thought.path, thought.start)


def check_length(config: Any, tokens: int) -> None:
    """Raises PromptError for a prompt of more tokens than a model of this config can read."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise PromptError(
            f"a prompt of {tokens:,} tokens is longer than this model can read ({longest:,}): shorten the question, "
            "or take fewer or smaller frames"
        )


def row_faults(
    rows: Iterable[Row],
    check: Callable[[Row], object] = check_video,
    workers: int | None = None,
) -> dict[str, str]:
    """Why rows cannot be worked on, by id, in their order: what `check` raises.

    A header is quickly read; damage behind it shows when the frames are decoded. `workers`: threads; a tokenizer
    stands only one.
    """

    def fault(item: tuple[int, Row]) -> str:
        try:
            check(item[1])
        except (PromptError, VideoError) as error:
            return str(error)
        return ""

    with thread_pool(workers) as pool:
        outcomes = completed(pool, fault, enumerate(rows))
        shown = tqdm(outcomes, "rows checked", length_hint(rows), leave=False)
        found = sorted((number, row.id, reason) for (number, row), reason in shown if reason)
    return {name: reason for _, name, reason in found}


def fault_lines(faults: Mapping[str, str], source: str | Path) -> str:
    """The first faults, a line each: place, id and reason."""
    places: dict[str, str] = {}
    with suppress(OSError):
        for place, value in scan_objects(source):
            if isinstance(value, dict) and isinstance(value.get("id"), str):
                places.setdefault(value["id"], place)
    named = [
        f"{places[name]}: {name}: {reason}" if name in places else f"{name}: {reason}"
        for name, reason in list(faults.items())[:NAMED]
    ]
    more = len(faults) - len(named)
    return "\n".join([*named, *([f"… and {more} more"] if more else [])])


def sound_rows(
    source: str | Path,
    check: Callable[[Row], object] | None = check_video,
    max_errors: float = 1.0,
    limit: int | None = None,
) -> list[Row]:
    """The rows of a file that can be worked on; the others are named, and counted.

    Args:
        check: raises PromptError or VideoError; None: any row is good.
        max_errors: share of rows that may be left out.
        limit: only the first rows.

    Raises:
        RowError: there is none, or too many cannot be worked on.
        JSONError, OSError: the file cannot be read.
    """
    rows, faults = scan_rows(source)
    rows = rows[:limit]
    count = len(rows) + len(faults)
    faults |= row_faults(rows, check) if check else {}
    if len(faults) == count:
        raise RowError(
            f"{source} holds no row that can be worked on\n{fault_lines(faults, source)}"
        )
    tell_faults(faults, count, source, max_errors)
    return [row for row in rows if row.id not in faults]


def told_rows(source: str | Path, max_errors: float = 1.0) -> RowFile:
    """The rows of a file; lines that hold none are named. Raises as `RowFile`, and RowError if they are too many."""
    rows = RowFile(source)
    tell_faults(rows.malformed, len(rows) + len(rows.malformed), source, max_errors)
    return rows


def tell_faults(
    faults: Mapping[str, str], count: int, source: str | Path, max_errors: float = 1.0
) -> None:
    """Name those of `count` rows that are left out. Raises RowError if they are more than the share `max_errors`."""
    if not faults:
        return
    named, lines = f"{len(faults)} of {count} rows cannot be worked on", fault_lines(faults, source)
    if len(faults) > max_errors * count:
        raise RowError(f"{named}, more than --max-errors {max_errors:g} allows:\n{lines}")
    log.warning("%s, and are left out:\n%s", named, lines)
