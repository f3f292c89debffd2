"""`storm import`, `storm export`, `storm leaks`, `storm gallery`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from storm_vlm.datasets.convert import Counts

app = typer.Typer()
console = Console()
Rows = Annotated[Path, typer.Argument(help="A JSONL file of rows.")]


@app.command("import")
def import_command(
    format: Annotated[
        Literal["video-r1", "videoespresso", "llava-video", "llama-factory", "ms-swift", "openai"],
        typer.Argument(),
    ],
    source: Annotated[Path, typer.Argument(help="A JSON or JSONL file of the data set.")],
    out: Annotated[Path, typer.Argument(help="The JSONL file of rows to write.")],
    videos: Annotated[Path, typer.Option(help="What the source's video names are relative to.")],
    split: Literal["train", "validation", "test", "ood"] = "train",
    check_videos: Annotated[
        bool, typer.Option("--check-videos", help="Reject rows whose video file is missing.")
    ] = False,
    core_frames: Annotated[
        Path | None,
        typer.Option(help="VideoEspresso: the core frames' folder, to find them in the videos."),
    ] = None,
) -> None:
    """Make rows of a data set; what is wrong goes to OUT.rejects.jsonl with the reason."""
    from storm_vlm.datasets.convert import import_rows

    _report(import_rows(format, source, out, videos, split, check_videos, core_frames), out)


@app.command("export")
def export_command(
    format: Annotated[Literal["llama-factory", "ms-swift"], typer.Argument()],
    rows: Rows,
    out: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
) -> None:
    """Write rows for SFT in another trainer, posed as our own prompt poses them."""
    from storm_vlm.datasets.convert import export_rows
    from storm_vlm.datasets.llama_factory import dataset_info

    _report(export_rows(format, rows, out), out)
    if format == "llama-factory":
        console.print("for its dataset_info.json:", highlight=False)
        console.print_json(json.dumps({out.stem: dataset_info(out.name)}))


def _report(counts: Counts, out: Path) -> None:
    from storm_vlm.datasets.convert import rejects_file

    table = Table("", "reason", "count", box=None)
    table.columns[2].justify = "right"
    table.add_row("written", str(out), f"{counts.written:,}")
    if counts.renamed:
        table.add_row("", "of those, renamed: their id was taken", f"{counts.renamed:,}")
    for name, reasons in (("skipped", counts.skipped), ("rejected", counts.rejected)):
        for reason, count in reasons.most_common():
            table.add_row(name, escape(reason), f"{count:,}")
    console.print(table)
    if counts.rejected:
        typer.echo(f"rejected ones with reasons: {rejects_file(out)}")
    if not counts.written:
        raise ValueError(f"no row was written to {out}; check the format and the reasons above")


@app.command()
def leaks(
    train: Rows,
    evaluation: Rows,
    remove: Annotated[
        Path | None, typer.Option(help="Write the training rows that leak nowhere to this file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every match to this JSON file.")] = None,
    num_frames: Annotated[int, typer.Option(min=0, help="Of each clip; 0: names only.")] = 32,
    cache: Annotated[Path, typer.Option(help="Folder to keep the frames' hashes in.")] = Path(
        "runs/frame_hashes"
    ),
) -> None:
    """Training clips that are also evaluation clips, by name and by what the frames show."""
    from dataclasses import asdict

    from storm_vlm.data.atomic_write import write_json
    from storm_vlm.data.row import read_rows, write_rows
    from storm_vlm.datasets.leaks import find_leaks, without_leaks

    rows = read_rows(train)
    found = find_leaks(rows, read_rows(evaluation), cache, num_frames)
    kept = without_leaks(rows, found)
    table = Table(
        "training clip", "rows", "evaluation clip", "rows", "why", "share", "distance", box=None
    )
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
        typer.echo(f"… and {len(found.leaks) - 20} pairs more: see them with --out FILE.json")
    typer.echo(
        f"{len(rows) - len(kept)} of {len(rows)} training rows leak, in {len(found.leaks)} pairs of clips"
    )
    if found.generic:
        typer.echo(f"{found.generic} clips have a name that says nothing: compared by frames alone")
    if found.unreadable:
        typer.echo(f"{len(found.unreadable)} videos cannot be read: compared by name alone")
        for reason in list(found.unreadable.values())[:3]:
            typer.echo(f"  {reason}")
    if out:
        write_json(out, asdict(found))
    if remove:
        write_rows(remove, kept)
        typer.echo(f"wrote {len(kept)} rows to {remove}")


@app.command()
def gallery(
    source: Annotated[Path, typer.Argument(help="A JSONL file of rows, or the folder of one.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default beside the rows.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows shown, the first of the file.")] = 100,
) -> None:
    """A page to look through rows: question, keyframes, plan, thought video beside its source."""
    from storm_vlm.datasets.gallery import write_gallery

    typer.echo(f"wrote {write_gallery(source, out, limit)}")
