"""Import a data set into rows and export rows for other trainers; nothing is dropped without a count and a reason."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import ValidationError
from tqdm.auto import tqdm

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.output import check_outputs, locked
from storm_vlm.data.prompt import answer_text, question_text
from storm_vlm.data.row import Row, RowError, Split, absolute, scan_rows, write_rows
from storm_vlm.datasets import EXPORTERS, IMPORTERS
from storm_vlm.datasets.parse import Fields, Skipped, file_name
from storm_vlm.datasets.shortcuts import Shortcuts
from storm_vlm.datasets.sources import source_objects
from storm_vlm.datasets.videoespresso import find_core_frames
from storm_vlm.errors import InputError, StormError

T = TypeVar("T")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class Counts:
    """What became of the objects of a source, by reason."""

    written: int = 0  # rows
    renamed: int = 0  # of those: another row had the id
    skipped: Counter[str] = field(default_factory=Counter)  # not for us
    rejected: Counter[str] = field(default_factory=Counter)  # wrong; in the file of rejects
    shortcuts: Shortcuts = field(default_factory=Shortcuts)  # to the answers of the rows


def rejects_file(out: Path) -> Path:
    """OUT.jsonl -> OUT.rejects.jsonl."""
    return out.with_suffix(".rejects.jsonl")


@dataclass(frozen=True)
class Finish:
    """What importers leave open: of a row's fields to the row. The arguments are those of `import_rows`."""

    name: str
    videos: Path
    split: Split
    check_videos: bool
    core_frames: Path | None
    left_out: Collection[str]  #: names of clips, see `clip_name`

    def __call__(self, fields: Fields, number: int, index: int) -> Row:
        """``number`` of the object, ``index`` of the row in it. Raises Skipped, ``ValueError`` and VideoError."""
        own = f"{self.name}-{number}" + (f"/{index}" if index else "")
        fields = {"split": self.split, "id": own} | fields
        if clip_name(fields["video"]) in self.left_out:
            raise Skipped("clip that is to be left out")
        fields["video"] = absolute(file_name(fields["video"]), self.videos)
        if fields["video"].lower().endswith(PICTURES):
            raise InputError(f"a picture where a video should be: {fields['video']}")
        if thought := fields.get("thought_video"):
            fields["thought_video"] = thought | {"path": absolute(thought["path"], self.videos)}
        if self.check_videos and not os.path.isfile(fields["video"]):
            raise InputError(f"video file missing: {fields['video']}")
        if of_video := fields.pop("of_video", None):
            fields |= of_video(fields["video"])
        if self.core_frames and (images := fields["meta"].get("core_frames")):
            files = [self.core_frames / image for image in images]
            fields["keyframes"] = find_core_frames(fields["video"], files)
        row = Row.model_validate(fields)
        question_text(row.question, row.options)  # raises for what no prompt could say
        answer_text(row)
        return row


def import_rows(
    name: str,
    source: Path,
    out: Path,
    videos: Path | None = None,
    split: Split = "train",
    check_videos: bool = False,
    core_frames: Path | None = None,
    without: Path | None = None,
) -> Counts:
    """Write the rows of a data set to ``out``, and what is wrong beside it, with the reason.

    Args:
        name: a key of `IMPORTERS`.
        source: a JSON file; a folder of such files, or of samples; a tar of such folders, which is unpacked.
        videos: the folder that the source's video names are relative to, and tars are unpacked into; by default a
            source that is a folder.
        split: of every row, unless an object brings its own (as our exports do).
        check_videos: reject a row whose file is not there.
        core_frames: the folder of VideoEspresso's core frames, to find them in the videos as keyframes; slow.
        without: a source of any layout, whose clips are left out by name: a benchmark's.

    An id that is taken becomes "id#2" …; a row that is there already, word for word, is skipped. Raises
    StormError if the source is not JSON, and ``OSError``; then nothing is written.
    """
    counts, importer = Counts(), IMPORTERS[name]
    if isinstance(importer, type):
        importer = importer()
    if videos is None and not source.is_dir():
        raise StormError(
            f"{source} is no folder: say what its video names are relative to (--videos)"
        )
    videos = (videos or source).absolute()
    left_out = clips_of(without, videos) if without else frozenset[str]()
    finish = Finish(name, videos, split, check_videos, core_frames, left_out)

    def rows(rejects: TextIO) -> Iterator[Row]:
        objects = tqdm(source_objects(source, videos), "objects", leave=False)
        for number, (_, item) in enumerate(objects):
            try:
                if isinstance(item, StormError):
                    raise InputError(f"part of the source that cannot be read: {item}")
                yield from [finish(f, number, i) for i, f in enumerate(importer(item))]
            except Skipped as skipped:
                counts.skipped[str(skipped)] += 1
            except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
                shown = None if isinstance(item, StormError) else item
                _reject(rejects, counts, error, shown)

    with locked(out.absolute().parent, out.name), ExitStack() as stack:
        rejects = _open_rejects(stack, source, out)
        if made := _unless_empty(_unique(rows(rejects), counts)):
            write_rows(out, made)
    return counts


def clip_name(video: str) -> str:
    """Folder and name of a clip: what is left of its path in every copy of a data set."""
    return "/".join(Path(video).parts[-2:])


def clips_of(source: Path, videos: Path) -> set[str]:
    """`clip_name` of every `video`, `video_path` or `path` that a source's objects name."""
    keys = ("video", "video_path", "path")
    objects = (item for _, item in source_objects(source, videos) if isinstance(item, dict))
    return {clip_name(o[key]) for o in objects for key in keys if isinstance(o.get(key), str)}


def export_rows(name: str, source: Path, out: Path) -> Counts:
    """Write rows as JSONL for another trainer's SFT, and those that its layout cannot say beside it.

    The question is posed and the answer written as our own prompt does it, so a baseline trained there reads the same
    text. Videos are absolute paths. Raises ``RowError`` and ``OSError``.
    """
    counts, exporter = Counts(), EXPORTERS[name]

    def lines(rejects: TextIO) -> Iterable[str]:
        found, faults = scan_rows(source)
        for place, fault in faults.items():
            _reject(rejects, counts, RowError(fault), place)
        for row in found:
            try:
                yield json.dumps(exporter(row), ensure_ascii=False) + "\n"
                counts.written += 1
            except ValueError as error:
                _reject(rejects, counts, error, row.model_dump())

    with ExitStack() as stack:
        rejects = _open_rejects(stack, source, out)
        if made := _unless_empty(lines(rejects)):
            unfinished = stack.enter_context(in_one_step(out))
            stack.enter_context(unfinished.open("w", encoding="utf-8")).writelines(made)
    return counts


def _unless_empty(items: Iterable[T]) -> Iterator[T] | None:
    """None where there is nothing to put into a file: what was there stays."""
    rest = iter(items)
    return next((chain([first], rest) for first in rest), None)


def _unique(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    seen: dict[str, list[int]] = {}
    for row in rows:
        content = hash((row.video, row.question, row.options, row.answer))
        others = seen.setdefault(row.id, [])
        if content in others:
            counts.skipped["the same row again"] += 1
            continue
        others.append(content)
        number = len(others)
        while number > 1 and f"{row.id}#{number}" in seen:
            number += 1
        if number > 1:
            row = row.model_copy(update={"id": f"{row.id}#{number}"})
            seen[row.id] = [content]
            counts.renamed += 1
        counts.written += 1
        counts.shortcuts.add(row)
        yield row


def _open_rejects(stack: ExitStack, source: Path, out: Path) -> TextIO:
    if out.suffix != ".jsonl":
        raise StormError(
            f"{out}: rows are written as JSON lines; name it {out.with_suffix('.jsonl')}"
        )
    check_outputs([out, rejects_file(out)], [source])
    unfinished = stack.enter_context(in_one_step(rejects_file(out)))
    # Half a character, as of an odd file name, becomes the escape that JSON has for it.
    return stack.enter_context(unfinished.open("w", encoding="utf-8", errors="backslashreplace"))


def _reject(rejects: TextIO, counts: Counts, error: Exception, item: Any) -> None:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        text = f"{'.'.join(map(str, fault['loc'])) or 'row'} is wrong: {fault['msg']}"
    elif isinstance(error, ValueError):
        text = str(error)
    else:
        text = f"not as the format says: {type(error).__name__}: {error}"
    reason, _, detail = text.partition(":")
    counts.rejected[reason] += 1
    line = {"reason": reason, "detail": detail.strip(), "row": item}
    rejects.write(json.dumps(line, ensure_ascii=False) + "\n")
