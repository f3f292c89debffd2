"""The `storm` command. Each verb imports what it needs, so that `storm --help` is quick."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from storm_vlm.cli import build as construction
from storm_vlm.cli import evaluate as evaluation
from storm_vlm.cli.analyze import app as analysis_app
from storm_vlm.cli.datasets import app as formats
from storm_vlm.cli.lab import app as reproduce_app
from storm_vlm.cli.report import app as report_app
from storm_vlm.errors import StormError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Latent video reasoning with STORM."
)
app.add_typer(evaluation.app)
app.add_typer(report_app)
app.add_typer(analysis_app)
app.add_typer(reproduce_app)
console = Console()
errors = Console(stderr=True)

Checkpoint = Annotated[
    str,
    typer.Option(help="Folder or hub name; by default the trained micro model that is shipped."),
]


@app.command()
def answer(
    video: Annotated[str, typer.Argument(help="A video file.")],
    question: str,
    option: Annotated[
        list[str] | None, typer.Option("--options", help="An option; repeat for each.")
    ] = None,
    checkpoint: Checkpoint = "",
    latent_mode: Annotated[
        Literal["force", "auto", "off"] | None,
        typer.Option(help="force, auto or off; by default what the checkpoint is for."),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames read from the clip.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print slots used, forced end, timings.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that the checkpoint brings.")
    ] = False,
) -> None:
    """Answer a question about a video."""
    from storm_vlm.inference.pipeline import StormPipeline
    from storm_vlm.lab.checkpoints import shipped

    pipeline = StormPipeline.from_pretrained(
        checkpoint or str(shipped("storm")),
        num_frames=num_frames,
        latent_mode=latent_mode,
        trust_remote_code=trust_remote_code,
    )
    result = pipeline.answer(video, question, option or ())
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    else:
        typer.echo(result.option or result.text)


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a micro one: stage1, stage2, sft …")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. training.max_steps=100")
    ] = None,
) -> None:
    """Train one stage."""
    from storm_vlm.lab.experiment import MICRO_CONFIGS
    from storm_vlm.training.config import load_config
    from storm_vlm.training.train import train as run

    named = MICRO_CONFIGS / f"{config}.yaml"
    path = named if named.exists() and not Path(config).exists() else config
    console.print(f"saved {run(load_config(path, overrides))}")


@app.command()
def plan(
    backbone: Annotated[
        str, typer.Argument(help="Folder or hub name, read without its weights; default: micro.")
    ] = "",
    num_frames: Annotated[int, typer.Option(min=1)] = 32,
    width: Annotated[int, typer.Option(min=1, help="Of the source's frames, in pixels.")] = 1280,
    height: Annotated[int, typer.Option(min=1)] = 720,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Per frame; default: the processor's.")
    ] = None,
    question_tokens: Annotated[int, typer.Option(min=1, help="All of the prompt's text.")] = 150,
    answer_tokens: Annotated[int, typer.Option(min=1)] = 8,
    latent_budget: Annotated[int, typer.Option(min=0, help="K; 0: SFT only.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Per device.")] = 1,
    accumulation: Annotated[int, typer.Option(min=1)] = 1,
    devices: Annotated[int, typer.Option(min=1)] = 1,
    sharding: Literal["none", "zero2", "fsdp"] = "none",
    lora_rank: Annotated[int, typer.Option(min=0, help="0: full fine-tuning.")] = 0,
    lora_targets: Annotated[
        str, typer.Option(help="Names of the decoder's linear layers.")
    ] = "q_proj,k_proj,v_proj,o_proj",
    freeze_vision: bool = True,
    checkpointing: bool = False,
    dtype: Literal["bf16", "fp32"] = "bf16",
    tflops: Annotated[
        float | None, typer.Option(help="Sustained, of a device: prints time, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and FLOPs, to be read.")] = False,
) -> None:
    """What a training step would cost: tokens, parameters, memory, FLOPs."""
    from storm_vlm.lab.checkpoints import shipped
    from storm_vlm.training.planning import PlanRequest, table
    from storm_vlm.training.planning import plan as run

    request = PlanRequest(
        num_frames=num_frames,
        width=width,
        height=height,
        max_pixels=max_pixels,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
        latent_budget=latent_budget,
        batch_size=batch_size,
        accumulation=accumulation,
        devices=devices,
        sharding=sharding,
        lora_rank=lora_rank,
        lora_targets=tuple(lora_targets.split(",")),
        freeze_vision=freeze_vision,
        checkpointing=checkpointing,
        dtype=dtype,
    )
    costs = run(backbone or str(shipped("backbone")), request)
    if as_json:
        typer.echo(json.dumps(asdict(costs)))
    else:
        console.print(table(costs, tflops))


@app.command()
def world(
    out: Annotated[Path, typer.Argument(help="Folder to write clips, thought videos and rows to.")],
    count: int = 100,
    kind: Literal["reasoning", "perception"] = "reasoning",
    split: Literal["train", "validation", "test", "ood"] = "train",
    seed: int = 0,
    continued: Annotated[
        bool, typer.Option(help="Clips that go on after the part to be seen: the real future.")
    ] = False,
    questions: Annotated[int, typer.Option(min=1, help="Asked about each reasoning scene.")] = 1,
) -> None:
    """Write clips of the micro world, with questions, plans and thought videos."""
    from storm_vlm.lab.world.clips import build_world

    console.print(f"wrote {build_world(out, kind, split, count, seed, continued, questions)}")


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="Where to save the backbone.")],
    data: Annotated[Path, typer.Option(help="Where to keep the clips.")] = Path("runs/perception"),
    clips: int = 4000,
    steps: int = 6450,
    seed: int = 0,
) -> None:
    """Make the micro backbone again: Qwen2.5-VL in small, trained from scratch on perception questions."""
    from storm_vlm.lab.pretrain import pretrain as run

    run(out, data, clips, steps, seed)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Argument(help="Folder for data, checkpoints and report.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """The whole method on the micro world, in minutes on a CPU; safe to interrupt and run again."""
    from storm_vlm.lab.quickstart import quickstart as run

    run(out, console)


bench = typer.Typer(no_args_is_help=True, help="Measure; every figure is a ratio within one run.")
bench.add_typer(evaluation.bench)
app.add_typer(bench, name="bench")
app.add_typer(formats)
app.add_typer(construction.app, name="build")
bench.command("build")(construction.bench_build)


@bench.command("train")
def bench_train(
    shape: Annotated[
        Literal["micro", "3b", "7b"], typer.Option(help="Of the model; weights are random.")
    ] = "micro",
    prefix: Annotated[int, typer.Option(min=200, help="Tokens of the prompt, about.")] = 4000,
    latent_budget: Annotated[int, typer.Option(min=1, help="K.")] = 8,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", help="Rows; repeat for each. 1 and 8.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    checkpointing: bool = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    results: Annotated[Path | None, typer.Option(help="JSON file for the record.")] = None,
) -> None:
    """Stage I and Stage II steps against a plain SFT step, and against recomputing everything."""
    from storm_vlm.lab.bench.training import bench_train as run

    found = run(
        shape, prefix, latent_budget, batches or [1, 8], rounds, checkpointing, device, results
    )
    console.print_json(json.dumps(found))


def main() -> None:
    """Entry point: expected errors become one line; STORM_DEBUG=1 shows where they came from."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("storm_vlm").setLevel(logging.INFO)  # what was chosen, and why
    try:
        app()
    except (OSError, StormError, ValueError) as error:
        if os.environ.get("STORM_DEBUG"):
            raise
        errors.print(f"[red]storm:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
