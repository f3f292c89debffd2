"""`storm bench …`: what is measured for the record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators
from cyclopts.types import NonNegativeFloat, PositiveInt

from storm_vlm.cli.terminal import LAB, Switch, console, show_json

app = App(name="bench", group=LAB, help="Measure; every figure is a ratio within one run.")
Shape = Literal["micro", "3b", "7b"]
Results = Annotated[Path | None, Parameter(help="JSON file for the record.")]
Device = Annotated[str, Parameter(help="cpu, or cuda.")]


def _at_least(least: int) -> Parameter:
    return Parameter(validator=validators.Number(gte=least))


@app.command
def train(
    *,
    shape: Shape = "micro",
    prefix: Annotated[int, _at_least(200)] = 4000,
    latent_budget: PositiveInt = 8,
    batches: Annotated[list[PositiveInt], Parameter("--batch", negative="")] = [1, 8],  # noqa: B006
    rounds: PositiveInt = 5,
    checkpointing: Annotated[bool, Switch] = False,
    device: Device = "cpu",
    results: Results = None,
) -> None:
    """Stage I and Stage II steps against a plain SFT step, and against recomputing everything.

    Args:
        shape: Of the model; weights are random.
        prefix: Tokens of the prompt, about.
        latent_budget: K.
        batches: Rows; repeat for each.
        rounds: Steps of each kind.
        checkpointing: Compute activations again for backward.
    """
    from storm_vlm.lab.bench.training import bench_train

    show_json(
        bench_train(shape, prefix, latent_budget, batches, rounds, checkpointing, device, results)
    )


@app.command
def build(
    *,
    results: Results = None,
    kills: PositiveInt = 40,
    rows: Annotated[int, _at_least(4)] = 48,
    workers: Annotated[list[PositiveInt], Parameter(negative="")] = [1, 2, 4, 8, 16],  # noqa: B006
    latency: NonNegativeFloat = 0.1,
    ray: bool = True,
) -> None:
    """Kill data construction at random, count what is lost or paid twice; rows per second by workers.

    Args:
        kills: Times that a run is killed.
        rows: Of the micro world.
        workers: Rows in work at a time; repeat for each.
        latency: Seconds that the stub teacher takes.
        ray: Compare with a local Ray cluster, too.
    """
    from storm_vlm.lab.bench.construction import bench_build

    show_json(bench_build(results, kills, rows, workers, latency, ray))


@app.command
def latency(
    *,
    shape: Shape = "micro",
    device: Device = "cpu",
    rows: PositiveInt = 8,
    rounds: PositiveInt = 5,
    batch_size: PositiveInt = 1,
    answer_tokens: PositiveInt = 4,
    cot_tokens: PositiveInt = 300,
    grounded_tokens: PositiveInt = 500,
    tool_rounds: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=5))] = 3,
    tool_tokens: Annotated[int, _at_least(50)] = 150,
    results: Results = None,
) -> None:
    """Seconds an item of each way to reason, at fixed lengths, on one model and the same rows.

    Args:
        shape: micro: the shipped model; else random weights and a synthetic clip.
        rows: Asked in every round.
        rounds: Each of all reasoners.
        batch_size: Rows at a time.
        answer_tokens: Of an answer.
        cot_tokens: Of a chain of thought.
        grounded_tokens: Of a grounded one.
        tool_rounds: Looks, then an answer.
        tool_tokens: Of the turn before a look.
    """
    from storm_vlm.lab.bench.latency import Lengths, bench_latency, latency_tables

    lengths = Lengths(answer_tokens, cot_tokens, grounded_tokens, tool_rounds, tool_tokens)
    figures = bench_latency(shape, device, rows, rounds, batch_size, lengths, results)
    console.print(*latency_tables(figures))


@app.command
def reasoners(
    *,
    results: Path = Path("docs/results/reasoners.json"),
    rows: Annotated[int, _at_least(2)] = 400,
    batch_size: PositiveInt = 50,
    max_new_tokens: PositiveInt = 64,
) -> None:
    """Accuracy of each way to reason on the micro world, and of the shipped STORM under controls.

    Args:
        results: JSON file for the record.
        rows: Questions of the micro world's test split.
        batch_size: Rows at a time.
        max_new_tokens: Of a chain of thought's turn.
    """
    from storm_vlm.lab.bench.reasoners import bench_reasoners

    show_json(bench_reasoners(results, rows, batch_size, max_new_tokens)["arms"])


@app.command
def scale(
    *,
    sizes: Annotated[list[PositiveInt] | None, Parameter("--rows", negative="")] = None,
    results: Results = None,
) -> None:
    """Time and memory of a run's start by the number of its rows, which share a few tiny clips.

    Args:
        sizes: Numbers of rows; repeat for each. Default: 10000, 30000 and 100000.
    """
    from storm_vlm.lab.bench.scale import bench_scale

    show_json(bench_scale(sorted(sizes or [10_000, 30_000, 100_000]), results))
