"""Which checkpoints of a run are whole.

A checkpoint is a folder of several files, and a killed process or a full disk can leave any part of it. So the
last thing written is a seal, in one step: the list of its files with their sizes. A folder without its seal,
or that is not what its seal says, is not resumed from.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storm_vlm.data.atomic_write import write_json
from storm_vlm.errors import StormError

SEAL = "complete.json"
logger = logging.getLogger(__name__)


class SaveError(StormError, OSError):
    """What a run wanted to write, why it could not, and how to go on."""

    def __init__(self, target: Path, run: Path, reason: Exception) -> None:
        kept = last_whole_checkpoint(run)
        hope = "to go on from " + kept.name if kept else "(no checkpoint was written before)"
        super().__init__(
            f"{target} could not be written ({reason}): make room, and start the same command again {hope}"
        )


@contextmanager
def all_or_nothing(run: Path) -> Iterator[Path]:
    """A folder for a run's results, whose files move into the run's own when all of them are written.

    Raises:
        SaveError: one could not be written; none is kept.
    """
    unfinished = run / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        for file in [path for path in unfinished.rglob("*") if path.is_file()]:
            place = run / file.relative_to(unfinished)
            place.parent.mkdir(exist_ok=True)
            file.replace(place)
    except Exception as error:  # each writer has its own way to say that the disk is full
        raise SaveError(run, run, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint whole."""
    write_json(checkpoint / SEAL, _sizes(checkpoint))


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be resumed from; None if it is whole."""
    try:
        sealed = dict(json.loads((checkpoint / SEAL).read_text()))
    except (OSError, ValueError, TypeError):
        return "it was never finished"
    found = _sizes(checkpoint)
    wrong = [name for name, size in sealed.items() if found.get(name) != size]
    return f"{wrong[0]} is damaged" if wrong else None if sealed else "it holds nothing"


def last_whole_checkpoint(run: Path) -> Path | None:
    """The newest whole `checkpoint-N` of a run."""
    return next((path for path in _newest_first(run) if fault(path) is None), None)


def set_torn_aside(run: Path) -> None:
    """Rename every checkpoint that is not whole, and say so: nobody should take it for one that is."""
    for path in _newest_first(run):
        if wrong := fault(path):
            aside = path.with_name(f"torn-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("skipping %s: %s; it is now %s", path, wrong, aside.name)


def _newest_first(run: Path) -> list[Path]:
    numbered = {
        int(match[1]): path
        for path in run.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
