"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from storm_vlm.errors import AccessError

_half_files: set[Path] = set()  # of this process


class WriteError(AccessError):
    """A file that could not be written, most often because the disk is full; names it."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(
            f"{path} could not be written ({reason}): make room, or choose another place"
        )


@contextmanager
def half_file(path: Path, target: Path) -> Iterator[Path]:
    """A file that is removed with the end of its block, unless it has become `target` by then.

    Raises:
        WriteError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _half_files.add(path)
    try:
        yield path
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says it
        if isinstance(error, OSError) and (error.filename or not error.errno):
            raise
        raise WriteError(target, getattr(error, "strerror", None) or error) from error
    finally:
        path.unlink(missing_ok=True)
        _half_files.discard(path)


def discard_half_files() -> None:
    """Remove what other threads are writing: for a process that ends without waiting for them."""
    for path in tuple(_half_files):
        path.unlink(missing_ok=True)


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`, which it then replaces: readers see the old file or the whole new one.

    Its folder is made if it is not there. Raises WriteError.
    """
    # Not the process's id: processes on several machines may have the same, and share a folder.
    hidden = path.with_name(f".{path.stem}.{uuid4().hex[:12]}{path.suffix}")
    with half_file(hidden, path) as unfinished:
        yield unfinished
        os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Write in one step."""
    with in_one_step(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """`write_text` of indented JSON; dataclasses become objects."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, default=asdict) + "\n")
