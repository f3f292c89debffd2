"""The verb that shows what the latents hold, and whether they matter: analyze."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators
from cyclopts.types import PositiveInt
from rich import box
from rich.console import Console
from rich.table import Column, Table

from storm_vlm.cli.terminal import console, show

if TYPE_CHECKING:
    from storm_vlm.evaluation.records import Reliance

AtLeastTwo = Parameter(validator=validators.Number(gte=2))


def analyze(
    checkpoint: str,
    rows: Path,
    /,
    *,
    out: Path,
    limit: Annotated[int | None, AtLeastTwo] = None,
    retrieval_rows: Path | None = None,
    decoder_rows: Path | None = None,
    batch_size: PositiveInt = 32,
    results: Path | None = None,
) -> None:
    """Do the latents hold the clip, and does the answer depend on them? Probes, interventions, pictures, a page.

    Args:
        checkpoint: Folder or hub name of a STORM checkpoint.
        rows: A JSONL file of rows that it was not trained on.
        out: Folder for the page, its figures and the states.
        limit: Only the first rows.
        retrieval_rows: Rows with several questions a video; by default ROWS.
        decoder_rows: Training rows with thought videos; by default half of the videos of ROWS.
        batch_size: Rows at a time.
        results: JSON file for the reliance table, for the record.
    """
    from storm_vlm.analysis.analyze import analyze as run

    analysis = run(checkpoint, rows, out, limit, retrieval_rows, decoder_rows, batch_size, results)
    print_reliance(console, analysis.reliance)
    show(f"wrote {out / 'report.html'}")


def print_reliance(to: Console, reliance: Reliance) -> None:
    """The table of latent reliance and what it comes to, for people."""
    cost, moved = reliance.reliance, reliance.sensitivity
    swap = reliance.interventions["swap_other_answer"]
    assert swap.follows and swap.follows_own  # reliance is not measured without them
    drawn = f" drawn from {reliance.drawn_from}" if reliance.drawn_from > reliance.n else ""
    to.print(_reliance_table(reliance, f"Latent reliance, {reliance.n} rows{drawn}"))
    to.print(
        f"latents of another answer cost {100 * cost.mean:.1f} points "
        f"({100 * cost.low:.1f} to {100 * cost.high:.1f}); "
        f"{swap.follows.mean:.1%} of answers become that clip's "
        f"({swap.follows_own.mean:.1%} with their own latents)"
    )
    to.print(
        f"latents move {moved.clip.mean:.2f} of their spread when the clip changes, "
        f"{moved.question.mean:.2f} when the question does"
    )


def _reliance_table(reliance: Reliance, title: str) -> Table:
    first = Column("what is fed into the slots", overflow="fold")
    heads = ("accuracy", "95% interval", "difference", "n")
    table = Table(first, *heads, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for line in reliance.interventions.values():
        share, difference = line.accuracy, line.difference
        if not share or not difference:
            table.add_row(line.what, "-", "", "", "0")
            continue
        table.add_row(
            line.what,
            f"{share.mean:.1%}",
            f"{share.low:.1%} - {share.high:.1%}",
            f"{100 * difference.mean:+.1f}",
            str(share.n),
        )
    return table
