"""The verbs that read runs: compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich import box
from rich.console import RenderableType
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from storm_vlm.cli.terminal import Json, Switch, console, show, show_json
from storm_vlm.errors import StormError

if TYPE_CHECKING:
    from storm_vlm.evaluation.compare import Gain
    from storm_vlm.evaluation.result_tables import Cell, Line, Table

SHORT = 40  # characters of a setting in which runs differ


def compare_runs(ours: Path, theirs: Path, /, *, as_json: Annotated[bool, Json] = False) -> None:
    """How much better one run is than another, question by question, and how sure that is.

    Args:
        ours: A run, or a folder of runs, one for each seed.
        theirs: What it is compared with, on the same questions.
        as_json: Everything, to be read by programs.
    """
    from storm_vlm.evaluation.compare import compare
    from storm_vlm.evaluation.run_folder import find_runs

    comparison = compare(find_runs([ours]), find_runs([theirs]))
    if as_json:
        show_json(comparison)
        return
    first, fifth = Column("", overflow="fold"), Column("difference, points", no_wrap=True)
    heads = ("n", "ours", "theirs", fifth, "only\nours", "only\ntheirs")
    table = RichTable(first, *heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_row("all", *_compared(comparison))
    for key, categories in comparison.groups.items():
        table.add_section()
        table.add_row(Text(f"by {key}", "dim"))
        for name, category in categories.items():
            table.add_row(Text(name), *_compared(category))
    console.print(table)
    seeds = f", {comparison.seeds} seeds" if comparison.seeds > 1 else ""
    show(f"{comparison.benchmark}, {comparison.videos} videos{seeds}; 95% intervals over videos")
    differs = [f"{key}: {_short(a)} / {_short(b)}" for key, (a, b) in comparison.differs.items()]
    between = "\n  ".join(differs)
    show(f"differ in: {between or 'nothing that they say'}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHORT else f"{' '.join(text.split())[:SHORT]} …"


def _compared(gain: Gain) -> list[str]:
    from storm_vlm.evaluation.result_tables import percent, signed

    shares = [percent(gain.ours), percent(gain.theirs), signed(gain.difference)]
    return [str(gain.n), *shares, str(gain.only_ours), str(gain.only_theirs)]


def report_runs(
    *runs: Path, out: Path | None = None, paper: Annotated[bool, Switch] = False
) -> None:
    """The paper's tables with these runs in them: intervals, unparsed answers, official rules, controls.

    Args:
        runs: Runs, or folders of runs; gains are over the first.
        out: Folder for report.md, report.html and report.csv.
        paper: The paper's figures beside, with corrections.
    """
    from storm_vlm.evaluation.report import write_report
    from storm_vlm.evaluation.run_folder import find_runs

    if not runs:
        raise StormError("name the runs to report, or a folder of runs")
    for table in write_report(find_runs(list(runs)), out, paper):
        console.print(*_printed(table, console.width), sep="\n")
        for note in table.notes:
            show(f"- {note}")
    if out:
        show(f"wrote {out}/report.html, report.md and report.csv")


def _printed(table: Table, width: int) -> list[RenderableType]:
    """The table; or, where it is wider than that, a list for each of its lines. No figure is cut or broken."""
    names, *figures = zip(*(line.cells for line in table.lines), strict=True)
    texts = [" ".join(cell.text for cell in names).split()]
    texts += [[cell.text for cell in column] for column in figures]
    widths = [
        max(map(len, (*head.split(), *column)))
        for head, column in zip(table.columns, texts, strict=True)
    ]
    title = Text(table.title, "bold")
    if sum(widths) + 3 * len(widths) > width:
        return [title, *(_listed(table, line) for line in table.lines)]
    heads = [
        Column(Text(head), min_width=least)
        for head, least in zip(table.columns, widths, strict=True)
    ]
    printed = RichTable(*heads, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for line in table.lines:
        printed.add_row(*(_cell(cell, line, "\n") for cell in line.cells))
    return [printed]


def _listed(table: Table, line: Line) -> RichTable:
    """A line's cells below each other, each behind its column's name."""
    first, *others = line.cells
    printed = RichTable(Column(no_wrap=True), Column(), show_header=False, box=None)
    printed.add_row(Text(table.columns[0], "dim"), _cell(first, line, "  "))
    for name, cell in zip(table.columns[1:], others, strict=True):
        printed.add_row(Text(f"  {name}", "dim"), _cell(cell, line, "  "))
    return printed


def _cell(cell: Cell, line: Line, separator: str) -> Text:
    style = "red" if cell.warning else "italic" if line.paper else "bold"
    small = f"{separator}{cell.small}" if cell.small else ""
    return Text.assemble((cell.text, style), (small, "red" if cell.warning else "dim"))
