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


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`, which it then replaces: readers see the old file or the whole new one.

    Its folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's id: processes on several machines may have the same, and share a folder.
    unfinished = path.with_name(f".{path.stem}.{uuid4().hex[:12]}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write in one step."""
    with in_one_step(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """`write_text` of indented JSON; dataclasses become objects."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, default=asdict) + "\n")
