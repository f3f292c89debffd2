"""The verbs that read runs: compare, report; and the one that fetches a benchmark's questions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from storm_vlm.cli.names import names
from storm_vlm.errors import StormError
from storm_vlm.evaluation.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from storm_vlm.evaluation.cells import Table

app = typer.Typer()
console = Console()


@app.command("compare")
def compare_runs(
    ours: Annotated[Path, typer.Argument(help="A run, or a folder of runs, one for each seed.")],
    theirs: Annotated[
        Path, typer.Argument(help="What it is compared with, on the same questions.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, to be read.")] = False,
) -> None:
    """How much better one run is than another, question by question, and how sure that is."""
    from storm_vlm.evaluation.compare import compare
    from storm_vlm.evaluation.run_folder import find_runs

    found = compare(find_runs([ours]), find_runs([theirs]))
    if as_json:
        typer.echo(json.dumps(found, default=asdict))
        return
    first, fifth = Column("", overflow="fold"), Column("difference, points", no_wrap=True)
    heads = ("n", "ours", "theirs", fifth, "only\nours", "only\ntheirs")
    table = RichTable(first, *heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_row("all", *_compared(found))
    for key, categories in found["groups"].items():
        table.add_section()
        table.add_row(Text(f"by {key}", "dim"))
        for name, category in categories.items():
            table.add_row(Text(name), *_compared(category))
    console.print(table)
    seeds = f", {found['seeds']} seeds" if found["seeds"] > 1 else ""
    console.print(
        f"{found['benchmark']}, {found['videos']} videos{seeds}; 95% intervals over videos"
    )
    differs = "; ".join(f"{key}: {a} / {b}" for key, (a, b) in found["differs"].items())
    console.print(f"differ in: {differs or 'nothing that they say'}", markup=False)


def _compared(found: dict[str, Any]) -> list[str]:
    from storm_vlm.evaluation.cells import percent, signed

    shares = [percent(found["ours"]), percent(found["theirs"]), signed(found["difference"])]
    return [str(found["n"]), *shares, str(found["only_ours"]), str(found["only_theirs"])]


@app.command("report")
def report_runs(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs, or folders of runs; gains are over the first.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.md, report.html and report.csv.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's figures beside, with corrections.")
    ] = False,
) -> None:
    """The paper's tables with these runs in them: intervals, unparsed answers, official rules, controls."""
    from storm_vlm.evaluation.report import write_report
    from storm_vlm.evaluation.run_folder import find_runs

    for table in write_report(find_runs(runs), out, paper):
        console.print(_printed(table))
        for note in table.notes:
            console.print(f"- {note}", markup=False, highlight=False)
    if out:
        console.print(f"wrote {out}/report.html, report.md and report.csv")


def _printed(table: Table) -> RichTable:
    title = Text(table.title, "bold")
    printed = RichTable(*table.columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for line in table.lines:
        cells: list[Text] = []
        for cell in line.cells:
            style = "red" if cell.warning else "italic" if line.paper else "bold"
            small = f"\n{cell.small}" if cell.small else ""
            cells.append(
                Text.assemble((cell.text, style), (small, "red" if cell.warning else "dim"))
            )
        printed.add_row(*cells)
    return printed


@app.command()
def download(
    benchmark: Annotated[str, typer.Argument(**names(BENCHMARKS))],
    folder: Annotated[Path, typer.Argument(help="Where to; videos are to be unpacked there.")],
) -> None:
    """Fetch a benchmark's questions from the hub (not its videos)."""
    hub = getattr(BENCHMARKS[benchmark], "hub", None)
    if hub is None:
        raise StormError(f"{benchmark} does not say where its questions are published")
    for written in hub.download(folder):
        console.print(f"wrote {written}")
    console.print(f"now unpack the videos of {hub.repository} into {folder}, at any depth")
