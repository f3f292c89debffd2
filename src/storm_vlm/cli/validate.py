"""`storm validate`: do the latents matter?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators
from cyclopts.types import NormFloat, PositiveInt
from rich import box
from rich.console import Console
from rich.table import Column, Table

from storm_vlm.cli.terminal import Json, console, show, show_json

if TYPE_CHECKING:
    from storm_vlm.evaluation.records import Reliance
    from storm_vlm.evaluation.verdict import Verdict

AtLeastTwo = Parameter(validator=validators.Number(gte=2))


def validate(
    checkpoint: str,
    rows: Path,
    /,
    *,
    out: Path,
    limit: Annotated[int | None, AtLeastTwo] = None,
    retrieval_rows: Path | None = None,
    decoder_rows: Path | None = None,
    batch_size: PositiveInt = 32,
    max_errors: NormFloat = 1.0,
    as_json: Annotated[bool, Json] = False,
) -> None:
    """Do the latents matter? Replacement tests, probes, a verdict; under `accelerate launch` on many GPUs.

    Args:
        checkpoint: Folder or hub name of a STORM checkpoint.
        rows: A JSONL file of rows that it was not trained on.
        out: Folder for page, figures, answers and states; a killed call goes on.
        limit: Only the first rows.
        retrieval_rows: Rows with several questions a video; by default ROWS.
        decoder_rows: Training rows with thought videos; by default half of the videos of ROWS.
        batch_size: Rows at a time.
        max_errors: Share of rows that may be left out because they cannot be worked on.
        as_json: Print verdict, replacement tests and probes, to be read by programs.
    """
    from storm_vlm.analysis.validate import validate as run

    found = run(checkpoint, rows, out, limit, retrieval_rows, decoder_rows, batch_size, max_errors)
    if found is None:  # another process tells
        return
    if as_json:
        show_json({name: getattr(found, name) for name in ("verdict", "reliance", "probes")})
        return
    print_reliance(console, found.reliance, found.verdict)
    show(f"wrote {out / 'report.html'}")


def print_reliance(to: Console, reliance: Reliance, verdict: Verdict) -> None:
    """The table of latent reliance and what it comes to, for people."""
    moved = reliance.sensitivity
    drawn = f" drawn from {reliance.drawn_from}" if reliance.drawn_from > reliance.n else ""
    to.print(_reliance_table(reliance, f"Latent reliance, {reliance.n} rows{drawn}"))
    to.print(
        f"latents move {moved.clip.mean:.2f} of their spread when the clip changes, "
        f"{moved.question.mean:.2f} when the question does"
    )
    to.print(verdict.text, highlight=False, markup=False)


def _reliance_table(reliance: Reliance, title: str) -> Table:
    first = Column("fed into the slots", overflow="fold")
    heads = ("right", "95%", "difference", "changed", "follow", "n")
    table = Table(first, *heads, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    for line in reliance.interventions.values():
        share, difference, name = line.accuracy, line.difference, line.what.split(":")[0]
        if not share or not difference or not line.changed:
            table.add_row(name, "-", "", "", "", "", "0")
            continue
        table.add_row(
            name,
            f"{share.mean:.1%}",
            f"{100 * share.low:.0f} - {100 * share.high:.0f}",
            f"{100 * difference.mean:+.1f}",
            f"{line.changed.mean:.1%}",
            f"{line.follows.mean:.1%}" if line.follows else "",
            str(share.n),
        )
    return table
