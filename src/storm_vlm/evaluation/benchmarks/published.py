"""Reading what benchmarks publish: their files, their videos, and their rows as our `Row`."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.json_objects import read_json, read_objects
from storm_vlm.data.row import Row, RowError
from storm_vlm.datasets.parse import bare_options
from storm_vlm.datasets.sources import read_parquet
from storm_vlm.errors import AccessError, InputError

if TYPE_CHECKING:
    from storm_vlm.evaluation.benchmarks import Benchmark

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".m4v")
log = logging.getLogger(__name__)
Entry = dict[str, Any]  #: of a published file


@dataclass(frozen=True)
class Hub:
    """Where a benchmark's questions are published; its videos are archives to unpack by hand."""

    repository: str
    configs: tuple[str | None, ...] = (None,)
    split: str = "test"
    revision: str | None = None
    data_files: str | None = None

    @property
    def downloads(self) -> dict[str, str | None]:
        """The configs by the names of the files that `download` writes."""
        return {f"questions-{config or self.split}.jsonl": config for config in self.configs}

    def download(self, folder: Path) -> list[Path]:
        """Write each config's questions into `folder`, as JSON lines. Needs the extra `eval`."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError("downloading needs pip install 'storm-vlm[eval]'") from error
        written: list[Path] = []
        for name, config in self.downloads.items():
            published: Any = load_dataset(
                self.repository,
                config,
                split=self.split,
                revision=self.revision,
                data_files=self.data_files,
            )
            written.append(folder / name)
            with in_one_step(written[-1]) as unfinished:
                published.to_json(unfinished, lines=True, force_ascii=False)
        return written


def read_published(benchmark: Benchmark, folder: Path) -> list[Row]:
    """See `Benchmark.read`."""
    files, videos, rows = _files(benchmark, folder), Videos(folder), dict[str, Row]()
    for file in files:
        names = (file.stem.removeprefix("questions-"), file.parent.name)
        task = next((name for name in names if name in benchmark.tasks), "")
        if benchmark.tasks and not task:
            continue
        for number, published in enumerate(benchmark.entries(file), start=1):
            place = f"{file}: row {number}"
            try:
                row = benchmark.row(published, videos, task, number)
            except ValidationError as error:
                fault = error.errors()[0]
                field = ".".join(map(str, fault["loc"])) or "row"
                raise RowError(f"{place}: {field}: {fault['msg']}") from error
            except KeyError as error:
                raise RowError(f"{place}: {error.args[0]}: missing") from error
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                raise RowError(f"{place}: {error}") from error
            if row and rows.setdefault(row.id, row) is not row:
                raise RowError(f"{place}: id: {row.id!r} is taken: is a file there twice?")
    return list(rows.values())


def _files(benchmark: Benchmark, folder: Path) -> list[Path]:
    fetched = tuple(benchmark.hub.downloads) if benchmark.hub else ()
    for patterns in (fetched, *((pattern,) for pattern in benchmark.files)):
        found = (path for pattern in patterns for path in Path(folder).rglob(pattern))
        if files := sorted(path for path in found if path.is_file()):
            return files
    source = f"the data set {benchmark.hub.repository}" if benchmark.hub else "its files"
    raise AccessError(
        f"{folder} holds no {' or '.join(benchmark.files)}: download {source} into it"
    )


def read_entries(file: Path) -> Iterator[Entry]:
    """The objects of a JSON list, JSON lines or parquet file; one of another JSON file."""
    if file.suffix == ".jsonl":
        yield from (entry for _, entry in read_objects(file))
    elif file.suffix != ".parquet":
        entries = read_json(file)
        yield from entries if isinstance(entries, list) else [entries]
    else:
        yield from read_parquet(file)


class Videos:
    """The video files under a folder, looked up by what rows call them."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self._by_stem: defaultdict[str, list[Path]] = defaultdict(list)
        seen: set[str] = set()  # links may go round in circles
        for root, folders, names in os.walk(self.folder, followlinks=True):
            folders[:] = [f for f in folders if os.path.realpath(f"{root}/{f}") not in seen]
            seen |= {os.path.realpath(f"{root}/{f}") for f in folders}
            for name in sorted(names):
                if (path := Path(root) / name).suffix.lower() in SUFFIXES:
                    self._by_stem[unicodedata.normalize("NFC", path.stem)].append(path)

    def find(self, name: str, hints: Sequence[str] = (), elsewhere: Sequence[str] = ()) -> str:
        """The file that a row calls `name`: an id, a file name or a path, its suffix right or not.

        If `name` has folders, the file lies in the last of them (Art/0.mp4 is not Law/0.mp4). Several such files
        are told apart by all folders in `name`, then by the first of the folders `hints` (as
        "clevrer/video_validation") that one lies in; raises ValueError if that leaves several. Files in the
        folders `elsewhere` are other videos of the same name. Where there is none, the path that it should
        have: a run lists it as missing.
        """
        path = Path(name)
        known = path.suffix.lower() in SUFFIXES
        expected = path if known else path.with_name(path.name + ".mp4")
        stem = path.stem if known else path.name
        named = self._by_stem.get(unicodedata.normalize("NFC", stem), ())
        files = {os.path.realpath(file): file for file in named}.values()
        inside = {file: file.parent.relative_to(self.folder) for file in files}
        paths = [
            p
            for p, place in inside.items()
            if not set(elsewhere) & set(place.parts) and path.parent.name in ("", place.name)
        ]
        for hint in (path.parent.as_posix().removeprefix("./"), *hints):
            parts = "" if hint in ("", ".") else f"/{hint.strip('/')}/"
            if near := [p for p in paths if parts and parts in f"/{inside[p].as_posix()}/"]:
                paths = near
        if len(paths) > 1:
            raise InputError(f"video {name!r} is there twice ({paths[0]}, {paths[1]}): keep one")
        if paths:
            return str(paths[0])
        return os.path.normpath(self.folder / (hints[0] if hints else "") / expected)


def window(published: Entry, name: str) -> tuple[float | None, float | None]:
    """`start` and `end` of a stretch of the film; None for both where there is nothing between them."""
    start, end = published.get("start"), published.get("end")
    if start is not None and start == end:  # once in MVBench's object_interaction, until 2024-06-11
        log.warning("%s: start and end are both %s: the whole clip is shown", name, start)
        return None, None
    return start, end


def bare(options: Sequence[str]) -> tuple[str, ...]:
    """`bare_options`, unless nothing but letters is there.

    Equal options are told apart by their letter, in brackets: a Row wants distinct ones.
    """
    stripped = bare_options(options)
    texts = stripped if all(stripped) else [option.strip() for option in options]
    return tuple(
        f"{text} [{ascii_uppercase[i]}]" if texts.count(text) > 1 else text
        for i, text in enumerate(texts)
    )


def index_of(letter: str, options: Sequence[str]) -> int:
    """Of the option that "B", "(B)" or "B." stands for. Raises ValueError where there is none."""
    match = re.fullmatch(r"\s*\(?([A-Z])(?!\w).*", letter, re.DOTALL)
    index = ascii_uppercase.index(match[1]) if match else len(options)
    if index >= len(options):
        raise InputError(f"answer: {letter!r} is none of the {len(options)} options")
    return index


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    """Options in a harness's own form, each with a line of its own."""
    return "".join(map((form + "\n").format, ascii_uppercase, options))
