"""`storm bench …`: what is measured for the record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators
from cyclopts.types import PositiveInt

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
    from storm_vlm.lab.bench.training_step import bench_train

    show_json(
        bench_train(shape, prefix, latent_budget, batches, rounds, checkpointing, device, results)
    )


@app.command
def infer(
    *,
    shape: Shape = "micro",
    device: Device = "cpu",
    rows: PositiveInt = 8,
    rounds: PositiveInt = 5,
    batches: Annotated[list[PositiveInt], Parameter("--batch", negative="")] = [1, 4, 16],  # noqa: B006
    layers: PositiveInt | None = None,
    answer_tokens: PositiveInt = 4,
    cot_tokens: PositiveInt = 300,
    grounded_tokens: PositiveInt = 500,
    tool_rounds: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=5))] = 3,
    tool_tokens: Annotated[int, _at_least(50)] = 150,
    thoughts: Annotated[list[PositiveInt], Parameter("--thought", negative="")] = [64, 256, 1024],  # noqa: B006
    results: Results = None,
) -> None:
    """Seconds an item of each way to reason, at fixed lengths, on one model; and where they go.

    Args:
        shape: micro: the shipped model; else random weights and a synthetic clip.
        rows: Asked in every round, one at a time.
        rounds: Each of all ways.
        batches: Rows at a time, for the model alone; repeat for each.
        layers: Of a larger shape, where not all fit.
        answer_tokens: Of an answer.
        cot_tokens: Of a chain of thought.
        grounded_tokens: Of a grounded one.
        tool_rounds: Looks, then an answer.
        tool_tokens: Of the turn before a look.
        thoughts: Tokens of chains of thought in the model alone; repeat for each.
    """
    from storm_vlm.lab.bench.infer import Lengths, bench_infer, infer_tables

    tokens = (answer_tokens, cot_tokens, grounded_tokens, tool_rounds, tool_tokens)
    lengths = Lengths(*tokens, tuple(thoughts))
    figures = bench_infer(shape, device, rows, rounds, 1, lengths, results, batches, layers)
    console.print(*infer_tables(figures))


@app.command
def questions(
    *,
    shape: Shape = "micro",
    device: Device = "cpu",
    clips: PositiveInt = 32,
    asked: Annotated[int, Parameter("--questions", validator=validators.Number(gte=2, lte=4))] = 4,
    batch_size: PositiveInt = 32,
    rounds: PositiveInt = 5,
    results: Results = None,
) -> None:
    """Items a second where several questions are about one clip, against a clip for each.

    Args:
        shape: micro: the shipped model; else random weights and a synthetic clip.
        clips: Asked about in every round.
        asked: Questions about each.
        batch_size: Rows at a time.
        rounds: Each of both ways.
    """
    from storm_vlm.lab.bench.questions import bench_questions

    show_json(bench_questions(shape, device, clips, asked, batch_size, rounds, results))


@app.command
def scale(
    *,
    sizes: Annotated[list[PositiveInt] | None, Parameter("--rows", negative="")] = None,
    built: Annotated[list[PositiveInt] | None, Parameter("--built-rows", negative="")] = None,
    results: Results = None,
) -> None:
    """CPU time and memory by the number of rows: a run's start, an import, leaks, the filter, a build.

    Args:
        sizes: Numbers of rows; repeat for each. Default: 10000, 30000 and 100000.
        built: Those of a build, whose rows take longer. Default: 1000 and 10000.
        results: JSON file for the record; what else it holds stays.
    """
    from storm_vlm.lab.bench.scale import bench_scale

    show_json(bench_scale(sizes or [10_000, 30_000, 100_000], built or [1_000, 10_000], results))


@app.command
def read(
    *,
    sizes: Annotated[list[str] | None, Parameter("--size", negative="")] = None,
    num_frames: PositiveInt = 32,
    rounds: PositiveInt = 3,
    results: Results = None,
) -> None:
    """CPU seconds and memory of reading frames, beside torchcodec and decord where they are installed.

    Args:
        sizes: 360p, 720p, 2160p or "1080p, 10 minutes"; repeat for more. Default: all.
        num_frames: Of a clip.
        rounds: Of each reader; the fastest counts.
    """
    from storm_vlm.lab.bench.read import SIZES, bench_read

    show_json(bench_read(sizes or list(SIZES), num_frames, rounds, results))


@app.command
def serve(
    *,
    rounds: PositiveInt = 5,
    soak: Annotated[float, _at_least(0)] = 0,
    results: Results = None,
) -> None:
    """What `storm serve` costs over the pipeline itself, and what it stands.

    Args:
        rounds: Of 1, 8 and 32 questions at a time.
        soak: Seconds of twice the load that it can take, with clients that leave, broken videos and killed readers.
    """
    from storm_vlm.lab.bench.serve import bench_serve

    show_json(bench_serve(rounds, soak, results))


@app.command
def vllm(*, rounds: PositiveInt = 3, results: Results = None) -> None:
    """Items a second of vLLM with our plugin, with slots and without, beside the pipeline and stock `generate`.

    Args:
        rounds: Of 1, 8 and 32 questions at a time.
    """
    from storm_vlm.lab.bench.vllm_engine import bench_vllm

    show_json(bench_vllm(rounds, results))
