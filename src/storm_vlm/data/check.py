"""Which rows cannot be worked on, found out before the first is: one odd row must not end a long run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from storm_vlm.data.json_objects import read_objects
from storm_vlm.data.prompt import PromptError, answer_text, question_text
from storm_vlm.data.row import Row
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.data.video import VideoError, video_shape

NAMED = 10  # faults that a message lists


def check_text(row: Row) -> None:
    """Raises PromptError: a control token, or too many options."""
    question_text(row.question, row.options)
    answer_text(row)


def check_video(row: Row) -> None:
    """Raises VideoError: a header that cannot be read, a picture too thin, a window behind the video's end."""
    video_shape(row.video, row.start)


def check_videos(row: Row) -> None:
    """The thought video's, too."""
    check_video(row)
    if (thought := row.thought_video) is not None:
        video_shape(thought.path, thought.start)


def row_faults(rows: Sequence[Row], check: Callable[[Row], object] = check_video) -> dict[str, str]:
    """Why rows cannot be worked on, by id: by their text, and by `check`, which raises VideoError.

    A header is quickly read; damage behind it shows when the frames are decoded.
    """

    def fault(row: Row) -> str:
        try:
            check_text(row)
            check(row)
        except (PromptError, VideoError) as error:
            return str(error)
        return ""

    with thread_pool() as pool:
        reasons = list(tqdm(pool.map(fault, rows), "rows checked", len(rows), leave=False))
    return {row.id: reason for row, reason in zip(rows, reasons, strict=True) if reason}


def fault_lines(faults: Mapping[str, str], source: str | Path) -> str:
    """The first faults, a line each: place, id and reason."""
    places: dict[str, str] = {}
    with suppress(OSError):
        places = {value["id"]: place for place, value in read_objects(source) if "id" in value}
    named = [
        f"{places.get(id, source)}: {id}: {reason}" for id, reason in list(faults.items())[:NAMED]
    ]
    more = len(faults) - len(named)
    return "\n".join([*named, *([f"… and {more} more"] if more else [])])
