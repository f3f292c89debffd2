"""The objects of a source: of a JSON or parquet file, of a folder of such files and samples, of tars of such folders.

A sample is a folder with a `metadata.json` of its own, as the generators of VBVR write it: one object with `folder`
(absolute), `files` (all in it, relative to it), `metadata` and `prompt`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storm_vlm.data.json_objects import read_json, read_objects
from storm_vlm.errors import InputError

METADATA = ("metadata.json", "question_metadata.json")  # the second is the older name
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")


def source_objects(source: Path, videos: Path) -> Iterator[tuple[str, Any]]:
    """Each object with its place. Tars are unpacked into ``videos``, what is there already left as it is.

    Raises JSONError, InputError for a tar that is not whole or a folder without objects, and OSError.
    """
    if source.name in METADATA:
        source = source.parent
    if source.name.endswith(TARS):
        for sample in _unpacked(source, videos):
            yield from source_objects(sample, videos)
    elif source.is_dir():
        empty = True
        for found in _within(source, videos):
            empty = False
            yield found
        if empty:
            raise InputError(
                f"{source}: holds no JSON or parquet file, no tar and no folder with a metadata.json"
            )
    elif source.suffix == ".parquet":
        rows = enumerate(read_parquet(source), start=1)
        yield from ((f"{source}: row {number}", row) for number, row in rows)
    else:
        yield from read_objects(source)


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


def _within(folder: Path, videos: Path) -> Iterator[tuple[str, Any]]:
    entries = sorted(folder.iterdir())
    names = {entry.name for entry in entries}
    if any(name in names for name in METADATA) or any(n.startswith("ground_truth.") for n in names):
        yield str(folder), _sample(folder)
        return
    for entry in entries:
        if entry.is_dir():
            yield from _within(entry, videos)
        elif entry.name.endswith((".json", ".jsonl", ".parquet", *TARS)):
            yield from source_objects(entry, videos)


def _sample(folder: Path) -> dict[str, Any]:
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    metadata = next((name for name in METADATA if name in files), None)
    prompt = next((name for name in files if Path(name).name == "prompt.txt"), None)
    return {
        "folder": str(folder.absolute()),
        "files": files,
        "metadata": read_json(folder / metadata) if metadata else None,
        "prompt": (folder / prompt).read_text("utf-8").strip() if prompt else None,
    }


def _unpacked(tar: Path, folder: Path) -> list[Path]:
    """The files and folders at the tar's top, as they lie in `folder`."""
    tops: dict[str, None] = {}
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if not (member.isfile() or member.isdir()):
                    continue
                target = folder / os.path.normpath(member.name)
                if not (target.is_file() and target.stat().st_size == member.size):
                    archive.extract(member, folder, filter="data")
                tops[os.path.normpath(member.name).split("/")[0]] = None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(f"{tar}: not a whole tar ({error}): download it again") from error
    if "." in tops:
        tops |= dict.fromkeys(entry.name for entry in folder.iterdir())
    return [folder / top for top in tops if top != "."]
