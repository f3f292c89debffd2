"""Finished work on disk, under the hash of everything that determined it.

Whatever is found under its key need never be done again, by any process on any machine, so that a run may be
killed at any instant and started again. Two stores are merged by copying one over the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Kind = Literal["teacher", "thoughts", "rows"]


def key_of(**parts: Any) -> str:
    """SHA-256 of the parts as JSON; the order of keys does not matter."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """`folder/kind/ab/abcdef….suffix`. A file is there whole and for good (synced), or not at all."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._unfinished = (
            self.folder / "unfinished"
        )  # what a killed process leaves; may be deleted
        self._unfinished.mkdir(parents=True, exist_ok=True)

    def path(self, kind: Kind, key: str, suffix: str = ".json") -> Path:
        return self.folder / kind / key[:2] / (key + suffix)

    def read(self, kind: Kind, key: str) -> bytes | None:
        try:
            return self.path(kind, key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, kind: Kind, key: str, data: bytes) -> None:
        with self.place(kind, key, ".json") as unfinished:
            unfinished.write_bytes(data)

    @contextmanager
    def place(self, kind: Kind, key: str, suffix: str) -> Iterator[Path]:
        """A file to write, which takes its place once it has safely reached the disk."""
        path = self.path(kind, key, suffix)
        unfinished = self._unfinished / (uuid.uuid4().hex + suffix)
        try:
            yield unfinished
            _sync(unfinished)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished, path)
            _sync(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)

    def files(self, kind: Kind, suffix: str = ".json") -> list[Path]:
        return sorted((self.folder / kind).glob(f"*/*{suffix}"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
