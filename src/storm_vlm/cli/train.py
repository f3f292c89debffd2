"""`storm train`, and what it would cost: `storm plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts.types import PositiveFloat, PositiveInt

from storm_vlm.cli.terminal import Fields, Json, console, show, show_json
from storm_vlm.training.plan_request import PlanRequest

if TYPE_CHECKING:
    from rich.table import Table

    from storm_vlm.training.planning import Plan

GIB, TERA = 2**30, 1e12
STATES = ("weights", "gradients", "optimizer")


def train(config: str, /, *overrides: str) -> None:
    """Train one stage.

    Args:
        config: A YAML file, or the name of a micro one: stage1, stage2, sft …
        overrides: key=value, e.g. training.max_steps=100 method.latent_budget=4
    """
    from storm_vlm.lab.micro_config import MICRO_CONFIGS
    from storm_vlm.training.config import load_config
    from storm_vlm.training.train import train as run

    named = MICRO_CONFIGS / f"{config}.yaml"
    path = named if named.exists() and not Path(config).exists() else config
    show(f"saved {run(load_config(path, overrides))}")


def init(
    base: str,
    out: Path,
    /,
    *,
    latent_budget: PositiveInt = 8,
    num_frames: PositiveInt | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Make a base checkpoint one with latent tokens, untrained.

    Args:
        base: Folder or hub name.
        out: A new folder.
        latent_budget: K.
        num_frames: Of a clip, recorded for whoever asks the model.
        max_shard_size: Of a file of weights, e.g. 2GB; by default as the base has them.
    """
    from storm_vlm.training.initial import initial_checkpoint

    show(f"saved {initial_checkpoint(base, out, latent_budget, num_frames, max_shard_size)}")


def card(checkpoint: Path, /, *runs: Path) -> None:
    """Write a checkpoint's model card: how it was made, and what these runs say of it.

    Args:
        checkpoint: Its folder; README.md is written anew.
        runs: Runs of storm evaluate, or folders of runs.
    """
    from storm_vlm.evaluation.report import markdown, write_report
    from storm_vlm.evaluation.run_folder import find_runs
    from storm_vlm.training.card import write_card

    report = markdown(write_report(find_runs(runs))) if runs else ""
    results = report.partition("\n")[2].replace("\n## ", "\n### ")  # below a heading of its own
    show(f"wrote {write_card(checkpoint, results)}")


def plan(
    backbone: str | None = None,
    /,
    *,
    request: Annotated[PlanRequest, Fields] = PlanRequest(),  # noqa: B008
    tflops: PositiveFloat | None = None,
    as_json: Annotated[bool, Json] = False,
) -> None:
    """What a training step would cost: tokens, parameters, memory, FLOPs.

    Args:
        backbone: Folder or hub name, read without its weights; by default the shipped micro backbone.
        tflops: What a device sustains: prints seconds, too.
        as_json: Bytes and FLOPs, to be read by programs.
    """
    from storm_vlm.lab.checkpoints import shipped
    from storm_vlm.training.planning import plan as run

    costs = run(backbone or str(shipped("backbone")), request)
    if as_json:
        show_json(costs)
    else:
        console.print(_table(costs, tflops))


def _table(costs: Plan, tflops: float | None) -> Table:
    """A column for each kind of step: tokens, teraFLOPs, GiB and, at ``tflops`` sustained, seconds."""
    from rich.table import Table

    counts, grid = costs.parameters, " x ".join(map(str, costs.grid))
    table = Table(
        title=f"{costs.visual_tokens:,} visual tokens a clip ({grid} patches)\n"
        f"{counts.total:,} parameters: vision tower {counts.vision:,}, decoder {counts.decoder:,}\n"
        f"{counts.trainable:,} trainable"
    )
    for name in ("one step of one device", *costs.steps):
        table.add_column(name, justify="right" if name in costs.steps else "left")
    lines = [("tokens of a row", "sequence", 1.0)]
    lines.append(("TFLOP, vision", "vision_flops", TERA))
    lines.append(("[b]TFLOP[/b]", "flops", TERA))
    if tflops:
        lines.append((f"[b]seconds[/b] at {tflops:g} TFLOP/s", "flops", tflops * TERA))
    for part in (*STATES, "activations", "logits", "kv_cache", "working"):
        lines.append((f"GiB, {part.replace('_', ' ')}", part, GIB))
    lines.append(("[b]GiB at the peak[/b]", "peak", GIB))
    for label, field, unit in lines:
        values = [getattr(step, field) / unit for step in costs.steps.values()]
        table.add_row(label, *(f"{x:,.0f}" if unit == 1 else f"{x:,.4g}" for x in values))
    return table
