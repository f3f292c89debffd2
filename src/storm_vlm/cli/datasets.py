"""`storm import`, `storm export`, `storm leaks`, `storm gallery`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts.types import NonNegativeInt, NormFloat, PositiveInt
from rich.markup import escape
from rich.table import Column, Table

from storm_vlm.cli.terminal import Switch, console, part_of, show
from storm_vlm.datasets import EXPORTERS, IMPORTERS
from storm_vlm.errors import StormError

if TYPE_CHECKING:
    from storm_vlm.datasets.transfer import Counts


def import_command(
    format: Annotated[str, part_of(IMPORTERS)],
    source: Path,
    out: Path,
    /,
    *,
    videos: Path | None = None,
    split: Literal["train", "validation", "test", "ood"] = "train",
    check_videos: Annotated[bool, Switch] = False,
    core_frames: Path | None = None,
    without: Path | None = None,
) -> None:
    """Make rows of a data set; what is wrong goes to OUT.rejects.jsonl with the reason.

    Args:
        source: A JSON, JSONL or parquet file of the data set; a folder or a tar of such files, or of samples.
        out: The JSONL file of rows to write.
        videos: What the source's video names are relative to; by default SOURCE, if that is a folder. A tar is
            unpacked into it.
        split: Of the rows.
        check_videos: Reject rows whose video file is missing.
        core_frames: VideoEspresso: the core frames' folder, to find them in the videos.
        without: A benchmark's file: its clips are left out, by name.
    """
    from storm_vlm.datasets.transfer import import_rows

    counts = import_rows(format, source, out, videos, split, check_videos, core_frames, without)
    _report(counts, out)
    _report_shortcuts(counts)


def export_command(format: Annotated[str, part_of(EXPORTERS)], rows: Path, out: Path, /) -> None:
    """Write rows for SFT in another trainer, posed as our own prompt poses them.

    Args:
        rows: A JSONL file of rows.
        out: The JSONL file to write.
    """
    from storm_vlm.datasets.conversations import dataset_info
    from storm_vlm.datasets.transfer import export_rows

    _report(export_rows(format, rows, out), out)
    if format == "llama-factory":
        show("for its dataset_info.json:")
        console.print_json(data={out.stem: dataset_info(out.name)})


def _report(counts: Counts, out: Path) -> None:
    from storm_vlm.datasets.transfer import rejects_file

    table = Table("", Column("reason", overflow="fold"), "count", box=None)
    table.columns[2].justify = "right"
    table.add_row("written", escape(str(out)), f"{counts.written:,}")
    if counts.renamed:
        table.add_row("", "of those, renamed: their id was taken", f"{counts.renamed:,}")
    for name, reasons in (("skipped", counts.skipped), ("rejected", counts.rejected)):
        for reason, count in reasons.most_common():
            table.add_row(name, escape(reason), f"{count:,}")
    console.print(table)
    if counts.rejected:
        show(f"rejected ones with reasons: {rejects_file(out)}")
    if not counts.written:
        raise StormError(f"no row was written to {out}; check the format and the reasons above")


def _report_shortcuts(counts: Counts) -> None:
    """What guessers without the thought get right, by family of questions."""
    for family, (rows, accuracies) in counts.shortcuts.accuracies().items():
        shares = ", ".join(f"{name} {share:.0%}" for name, share in accuracies.items())
        show(f"{family}: {rows} rows; right by {shares}")


def leaks(
    train: Path,
    evaluation: Path,
    /,
    *,
    remove: Path | None = None,
    out: Path | None = None,
    num_frames: NonNegativeInt = 32,
    max_errors: NormFloat = 1.0,
    cache: Path = Path("runs/frame_hashes"),
) -> None:
    """Training clips that are also evaluation clips, by name and by what the frames show.

    Args:
        train: A JSONL file of rows.
        evaluation: A JSONL file of rows.
        remove: Write the training rows that leak nowhere to this file.
        out: Write every match to this JSON file.
        num_frames: Of each clip; 0: names only.
        max_errors: Share of lines that may hold no row.
        cache: Folder to keep the frames' hashes in.
    """
    from dataclasses import asdict

    from storm_vlm.data.atomic_write import write_json
    from storm_vlm.data.check import told_rows
    from storm_vlm.data.output import check_outputs
    from storm_vlm.data.row import write_rows
    from storm_vlm.datasets.leaks import find_leaks, without_leaks

    check_outputs([remove, out], [train, evaluation])
    # A clip that cannot be read is compared by its name.
    rows, others = (told_rows(file, max_errors) for file in (train, evaluation))
    found = find_leaks(rows, others, cache, num_frames)
    leaking = len({row for leak in found.leaks for row in leak.train_rows})
    clips = (Column(f"{kind} clip", overflow="fold") for kind in ("training", "evaluation"))
    heads = (Column(name, no_wrap=True) for name in ("rows", "rows", "why", "share", "distance"))
    table = Table(next(clips), next(heads), next(clips), *heads, box=None)
    for leak in found.leaks[:20]:
        apart = "" if leak.distance is None else f"{leak.distance:.3f}"
        table.add_row(
            escape(Path(leak.train).name),
            str(len(leak.train_rows)),
            escape(Path(leak.evaluation).name),
            str(len(leak.evaluation_rows)),
            ", ".join(leak.why),
            f"{leak.share:.0%}" if apart else "",
            apart,
        )
    if found.leaks:
        console.print(table)
    if len(found.leaks) > 20:
        show(f"… and {len(found.leaks) - 20} pairs more: see them with --out FILE.json")
    show(f"{leaking} of {len(rows)} training rows leak, in {len(found.leaks)} pairs of clips")
    if found.look_alikes:
        show(
            f"{len(found.look_alikes)} pairs look alike, but what stands still in them differs, as in two puzzles on "
            "one board: not counted as leaks; --out FILE.json has them, to be looked at"
        )
    if found.generic:
        show(
            f"{found.generic} clips have a name that says nothing, or that others have, too: compared by frames alone"
        )
    if found.unreadable:
        show(f"{len(found.unreadable)} videos cannot be read: compared by name alone")
        for reason in list(found.unreadable.values())[:3]:
            show(f"  {reason}")
    if out:
        write_json(out, asdict(found))
    if remove:
        write_rows(remove, without_leaks(rows, found))
        show(f"wrote {len(rows) - leaking} rows to {remove}")


def gallery(source: Path, /, *, out: Path | None = None, limit: PositiveInt = 100) -> None:
    """A page to look through rows: question, keyframes, plan, thought video beside its source.

    Args:
        source: A JSONL file of rows, or the folder of one.
        out: The page; by default beside the rows.
        limit: Rows shown, the first of the file.
    """
    from storm_vlm.datasets.gallery import write_gallery

    show(f"wrote {write_gallery(source, out, limit)}")
