"""Tables of runs as Markdown, as one self-contained page, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from storm_vlm.data.atomic_write import write_text
from storm_vlm.data.output import refuse_model
from storm_vlm.evaluation.records import Reliance
from storm_vlm.evaluation.result_tables import Cell, Measured, Table, build_tables, measure
from storm_vlm.evaluation.run_folder import Run
from storm_vlm.evaluation.statistics import Estimate
from storm_vlm.evaluation.summary import RunSummary, Shares
from storm_vlm.pages import render

HEADING = "STORM: evaluation"
READING = (
    "Accuracy in percent by the strict parser; what it cannot parse, and what could not be asked, counts as wrong. "
    "Brackets: 95% bootstrap interval over videos. Official: the rule that is named, the authors' own where there is "
    "one, on the same raw answers, its quirks included; it presumes the official prompt. What it has no verdict "
    "on (no judge was asked) counts as wrong, and the figure is a lower bound."
)


def write_report(runs: Sequence[Run], out: Path | None = None, paper: bool = False) -> list[Table]:
    """The tables of these runs; into `out` go report.md, report.html and report.csv.

    Gains and ratios are against the first run's system. Raises RunError for runs that cannot be compared.
    """
    if out:
        refuse_model(out)
    measured = measure(runs)
    tables = build_tables(measured, paper)
    if out:
        write_text(out / "report.md", markdown(tables))
        write_text(out / "report.html", html(tables, runs))
        write_text(out / "report.csv", as_csv(measured))
    return tables


def markdown(tables: Sequence[Table]) -> str:
    parts = [f"# {HEADING}", READING]
    for table in tables:
        rows = [[_escaped(column) for column in table.columns], ["---"] * len(table.columns)]
        for line in table.lines:
            cells = [_markdown(cell) for cell in line.cells]
            rows.append([f"*{cells[0]}*", *cells[1:]] if line.paper else cells)
        parts.append(f"## {_escaped(table.title)}")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        parts += ["\n".join(f"- {_escaped(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def _markdown(cell: Cell) -> str:
    text = _escaped(cell.text) + (" ⚠" if cell.warning else "")
    return f"{text}<br><sub>{_escaped(cell.small)}</sub>" if cell.small else text


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def html(tables: Sequence[Table], runs: Sequence[Run]) -> str:
    """One page without outside requests; light and dark as the reader's system is."""
    return render("evaluation.html", heading=HEADING, reading=READING, tables=tables, runs=runs)


CSV_COLUMNS = (
    *("system", "benchmark", "control", "group", "category", "n", "accuracy", "low", "high"),
    *("unparsed", "errors", "official", "official_scored", "official_rule", "official_source"),
    "seconds_per_item",
)


def as_csv(measured: Measured) -> str:
    """A line for each run, each of its categories and each kind of latents fed; shares from 0 to 1."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for key, summary in measured.summaries.items():
        run = dict(zip(CSV_COLUMNS, key, strict=False))
        writer.writerows(run | line for line in _csv_lines(summary, measured.runs[key].reliance))
    return text.getvalue()


def _csv_lines(summary: RunSummary, reliance: Reliance | None) -> Iterator[dict[str, Any]]:
    seconds = summary.seconds.total.mean if summary.seconds else None
    yield {"category": "all", **_csv_shares(summary), "seconds_per_item": seconds}
    for key, group in summary.groups.items():
        yield {"group": key, "category": "macro", **_csv_estimate(group.macro), "n": None}
        for name, category in group.categories.items():
            yield {"group": key, "category": name, **_csv_shares(category)}
    for kind, line in reliance.interventions.items() if reliance else ():
        yield {"group": "latents fed", "category": kind, **_csv_estimate(line.accuracy)}


def _csv_estimate(accuracy: Estimate | None) -> dict[str, Any]:
    if accuracy is None:
        return {"n": 0}
    return {"accuracy": accuracy.mean, "low": accuracy.low, "high": accuracy.high, "n": accuracy.n}


def _csv_shares(shares: Shares) -> dict[str, Any]:
    return {
        **_csv_estimate(shares.accuracy),
        **{"unparsed": shares.unparsed, "errors": shares.errors},
        **{"official": shares.official.accuracy, "official_scored": shares.official.scored},
        **{"official_rule": shares.official.rule, "official_source": shares.official.source},
    }
