"""Work that is kept on disk under the hash of everything that determined it: the one cache of this project.

A key is the SHA-256 of a JSON of parts, so another clip, model, setting or window has another file, and nothing stale
is ever read. A clip is a part by its *content*: a data set may be moved, copied or touched, and what was made (or
paid) stays. Reading every byte of every clip at each start would take hours, so a store remembers a file's hash as
long as path, size, time of change and inode are the same (`hashes.log`).

A file appears whole or not at all, and a damaged one counts as absent, so it is made again. Any number of processes,
on any machines, may share a folder and be killed at any time. Two stores are merged by copying one over the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from safetensors import SafetensorError

from storm_vlm.data.atomic_write import half_file

T = TypeVar("T")
_ENTRY = re.compile(rb"([0-9a-f]{64}) ([0-9a-f]{64}|\d+ \d+) \.")


def key_of(**parts: Any) -> str:
    """SHA-256 of the parts as JSON; the order of keys does not matter.

    Raises:
        TypeError, ValueError: a part is not JSON.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """Short facts that processes tell each other: a file of lines `key value .`, which only grows.

    A line is written at once. What a kill or a full disk leaves of one is skipped by all readers.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0

    def news(self) -> dict[str, str]:
        """What was added since the last call, by any process."""
        start = self._offset
        try:
            with open(self._file, "rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return {}
        whole = data[: data.rfind(b"\n") + 1]
        self._offset = start + len(whole)
        matches = map(_ENTRY.fullmatch, whole.splitlines())
        return {match[1].decode(): match[2].decode() for match in matches if match}

    def add(self, key: str, value: str) -> None:
        """The line break in front keeps it apart from half a line before it."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, f"\n{key} {value} .\n".encode())
        finally:
            os.close(descriptor)


class Store:
    """`folder/kind/ab/abcdef….suffix`. Safe to use from many threads.

    Args:
        folder: made when the first file is written.
        durable: files are on the disk, not only in its queue, before they take their place: for what was paid.
    """

    def __init__(self, folder: str | Path, durable: bool = False) -> None:
        self.folder = Path(folder).absolute()
        self.durable = durable
        self._unfinished = self.folder / "unfinished"  # what a kill leaves; may be deleted
        self._ledger = Ledger(self.folder / "hashes.log")
        self._hashes: dict[str, str] = self._ledger.news()

    def path(self, kind: str, key: str, suffix: str = ".json") -> Path:
        return self.folder / kind / key[:2] / (key + suffix)

    def read(
        self, kind: str, key: str, load: Callable[[Path], T], suffix: str = ".json"
    ) -> T | None:
        """What `load` makes of the file; None if it is not there, or damaged.

        Raises:
            OSError: it is there, but cannot be read.
        """
        with suppress(FileNotFoundError, ValueError, LookupError, EOFError, SafetensorError):
            return load(self.path(kind, key, suffix))
        return None

    def write(self, kind: str, key: str, data: bytes) -> None:
        with self.place(kind, key) as unfinished:
            unfinished.write_bytes(data)

    def set_aside(self, kind: str, key: str) -> str:
        """Free the key, as if nothing had been stored; what was stays under the key that is returned."""
        other = key_of(aside=[key, uuid4().hex])
        self.path(kind, other).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(self.path(kind, key), self.path(kind, other))
        return other

    @contextmanager
    def place(self, kind: str, key: str, suffix: str = ".json") -> Iterator[Path]:
        """A file to write, which takes its place once it is whole.

        Raises:
            WriteError: the disk is full.
            OSError: the folder cannot be written to.
        """
        path = self.path(kind, key, suffix)
        with half_file(self._unfinished / (uuid4().hex + suffix), path) as unfinished:
            yield unfinished
            self._sync(unfinished)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished, path)
            self._sync(path.parent)

    def files(self, kind: str, suffix: str = ".json") -> Iterator[Path]:
        for part in sorted((self.folder / kind).glob("*")):
            yield from sorted(part.glob(f"*{suffix}"))

    def content(self, file: str | Path) -> str:
        """SHA-256 of a file's bytes, which are read only if the file may have changed since the last time.

        Raises:
            OSError: it cannot be read.
        """
        path = os.path.realpath(file)
        state = os.stat(path)
        known = key_of(file=[path, state.st_size, state.st_mtime_ns, state.st_ino])
        if known not in self._hashes:
            self._hashes.update(self._ledger.news())
        found = self._hashes.get(known)
        if found is None:
            with open(path, "rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            self._hashes[known] = found
            with suppress(OSError):  # a folder that is only read from
                self._ledger.add(known, found)
        return found

    def _sync(self, path: Path) -> None:
        if self.durable:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
