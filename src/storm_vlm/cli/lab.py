"""The verb that does the paper's whole evidence: reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console()


@app.command()
def reproduce(
    folder: Annotated[
        Path | None,
        typer.Argument(help="For data, checkpoints and page; runs/reproduce, or -fast."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="For results.md, results/*.json and outcomes, which it goes on with; default: FOLDER."
        ),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(
            help="main, stages, targets, slot_inputs, sizes, latent_sizes or rows; repeat; default: all."
        ),
    ] = None,
    fast: Annotated[bool, typer.Option(help="A rehearsal: all of it, too short to learn.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(min=5, help="Of every run; default: 1200.")] = None,
    train_rows: Annotated[int | None, typer.Option(min=16, help="Default: 6000.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
) -> None:
    """The paper's tables and figures on the micro world, with intervals; safe to interrupt and run again."""
    from dataclasses import replace

    from storm_vlm.lab.reproduce.run import FAST, FULL
    from storm_vlm.lab.reproduce.run import reproduce as run

    plan = FAST if fast else FULL
    size = replace(
        plan.size, steps=steps or plan.size.steps, train_rows=train_rows or plan.size.train_rows
    )
    plan = replace(plan, size=size, seeds=seeds or plan.seeds)
    folder = folder or Path("runs/reproduce-fast" if fast else "runs/reproduce")
    command = "storm reproduce" + (" --fast" if fast else "")
    command += f" --seeds {plan.seeds} --steps {size.steps} --train-rows {size.train_rows}"
    command += "".join(f" --table {name}" for name in table or ())
    command += f" --out {out}" if out else ""
    found = run(folder, out or folder, plan, table or (), jobs, command)
    for sentences in found["findings"].values():
        for sentence in sentences:
            console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"wrote {(out or folder) / 'results.md'} and {folder / 'report.html'}")
