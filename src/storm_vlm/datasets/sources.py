"""The objects of a source: of a JSON or parquet file, of a folder of such files and samples, of tars of such folders.

A sample is a folder with a `metadata.json` of its own, as the generators of VBVR write it: one object with `folder`
(absolute), `files` (all in it, relative to it), `metadata` and `prompt`. Instead of one that cannot be read comes the
error that says why.
"""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from gzip import BadGzipFile
from lzma import LZMAError
from pathlib import Path
from typing import Any

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.json_objects import JSONError, read_json, read_objects
from storm_vlm.errors import InputError

log = logging.getLogger(__name__)
METADATA = ("metadata.json", "question_metadata.json")  # the second is the older name
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# What one object that holds all others calls them.
LISTS = ("data", "samples", "items", "annotations")
FILES = (".json", ".jsonl", ".parquet", *TARS)
PARTS = ("video", "image")  # folders within a sample


def source_objects(source: Path, videos: Path) -> Iterator[tuple[str, Any]]:
    """Each object with its place. Tars are unpacked into ``videos``, what is there already left as it is.

    Raises JSONError, InputError for a tar that is not whole or a source without objects, and OSError.
    """
    if source.name in METADATA:
        source = source.parent
    if source.name.endswith(TARS):
        found = _within(videos, videos, _unpacked(source, videos))
    elif source.is_dir():
        found = _within(source, videos)
    elif source.suffix == ".parquet":
        rows = enumerate(read_parquet(source), start=1)
        found = ((f"{source}: row {number}", row) for number, row in rows)
    else:
        found = _json_objects(source)
    empty = True
    for place, item in found:
        empty = False
        yield place, item
    if empty and (source.is_dir() or source.name.endswith(TARS)):
        raise InputError(
            f"{source}: holds no JSON or parquet file, no tar and no folder with a metadata.json"
        )


def _json_objects(file: Path) -> Iterator[tuple[str, Any]]:
    """Of lines, of a list, or of one object over many lines; which may hold all others, in a list or by their ids."""
    found = read_objects(file)
    with file.open("rb") as opened:
        head = opened.readline().decode("utf-8-sig", "replace")
    if head.startswith("{") and not _is_json(head):
        with suppress(JSONError):  # that of a line tells more
            found = [(str(file), read_json(file))]
    for place, value in found:
        parts = list(value.values()) if isinstance(value, dict) else []
        if len(parts) == 1 and set(value) <= set(LISTS) and isinstance(parts[0], list):
            yield from ((f"{place}: item {n}", item) for n, item in enumerate(parts[0], start=1))
        elif parts and all(isinstance(part, dict) for part in parts):
            yield from ((f"{place}: {key}", {"id": key, **item}) for key, item in value.items())
        else:
            yield place, value


def read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Its rows, a batch at a time in memory. Raises InputError."""
    try:
        import pyarrow  # comes with `datasets`
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{file}: parquet needs pip install 'storm-vlm[eval]'") from error
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not whole parquet ({error}): download it again") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _within(
    folder: Path, videos: Path, only: Collection[Path] | None = None
) -> Iterator[tuple[str, Any]]:
    """``only``: files and folders that are looked at."""
    entries = [
        entry
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith(".") and (only is None or entry in only)
    ]
    names = {entry.name for entry in entries}
    others = [entry for entry in entries if entry.name not in METADATA and _holds(entry)]
    shown = [*folder.glob("ground_truth.*"), *folder.glob("video/ground_truth.*")]
    if shown or (not others and not names.isdisjoint(METADATA)):
        yield str(folder), _sample(folder)
        return
    for entry in entries:
        if entry.is_dir():
            if not folder.resolve().is_relative_to(entry.resolve()):  # a link to what it lies in
                yield from _within(entry, videos, only)
        elif entry.name in METADATA:
            yield from _json_objects(entry)
        elif entry.name.endswith(FILES):
            yield from source_objects(entry, videos)


def _holds(entry: Path) -> bool:
    """Whether there may be objects in it, beside a sample's own parts."""
    return entry.name not in PARTS if entry.is_dir() else entry.name.endswith(FILES)


def _sample(folder: Path) -> dict[str, Any] | JSONError:
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    metadata = next((name for name in METADATA if name in files), None)
    prompt = next((name for name in files if Path(name).name == "prompt.txt"), None)
    try:
        return {
            "folder": str(folder.absolute()),
            "files": files,
            "metadata": read_json(folder / metadata) if metadata else None,
            "prompt": (folder / prompt).read_text("utf-8", "replace").strip() if prompt else None,
        }
    except JSONError as error:
        return error


def _unpacked(tar: Path, folder: Path) -> set[Path]:
    """The tar's files and folders as they lie in `folder`. A file appears whole: others may unpack the same."""
    found: set[Path] = set()
    links = 0
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if not member.isfile():
                    links += not member.isdir()
                    continue
                target = folder / tarfile.data_filter(member, str(folder)).name
                if not (target.is_file() and target.stat().st_size == member.size):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    with in_one_step(target) as unfinished, unfinished.open("wb") as file:
                        shutil.copyfileobj(content, file)
                found |= {target, *target.parents}
            stream: Any = archive.fileobj
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # where tarfile stops without a word
                raise tarfile.ReadError("bad header")
    except tarfile.FilterError as error:
        raise InputError(f"{tar}: {error}: do not trust it, or unpack it by hand") from error
    except (tarfile.TarError, EOFError, ValueError, zlib.error, LZMAError, BadGzipFile) as error:
        raise InputError(
            f"{tar}: not a whole tar ({error}): download it again, or unpack it yourself"
        ) from error
    if links:
        log.warning("%s: %d links and devices in it are left out", tar, links)
    return found
