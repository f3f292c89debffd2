"""The verbs of the laboratory: the micro world, its models, and the paper's whole evidence on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators
from cyclopts.types import NonNegativeInt, PositiveInt

from storm_vlm.cli.terminal import Switch, console, show


def world(
    out: Path,
    /,
    *,
    count: PositiveInt = 100,
    kind: Literal["reasoning", "perception", "grounding"] = "reasoning",
    split: Literal["train", "validation", "test", "ood"] = "train",
    seed: NonNegativeInt = 0,
    continued: Annotated[bool, Switch] = False,
    questions: PositiveInt = 1,
    world: Literal["mirrors", "chains", "crowded", "puzzle"] = "mirrors",
) -> None:
    """Write clips of a micro world, with questions, plans and thought videos.

    Args:
        out: Folder to write clips, thought videos and rows to.
        count: Scenes.
        kind: Of questions.
        split: No two share a scene.
        seed: Of the scenes.
        continued: Clips that go on after the part to be seen: the real future.
        questions: Asked about each reasoning scene.
        world: A ball among mirrors; the same in chains of three to seven steps, or with a second ball, too; or a
            sliding puzzle.
    """
    from storm_vlm.lab.world.clips import build_world

    show(f"wrote {build_world(out, kind, split, count, seed, continued, questions, world)}")


def pretrain(
    out: Path,
    /,
    *,
    data: Path = Path("runs/perception"),
    clips: PositiveInt = 4000,
    steps: PositiveInt = 1100,
    seed: NonNegativeInt = 0,
    model_type: Literal["qwen2_5_vl", "qwen3_vl"] = "qwen2_5_vl",
) -> None:
    """Make a micro backbone: a small model of a family, trained from scratch on perception questions.

    Args:
        out: Where to save the backbone.
        data: Where to keep the clips.
        clips: Of the micro world.
        steps: Of training.
        seed: Of weights and data.
        model_type: The family, as config.json names it.
    """
    from storm_vlm.lab.pretrain import pretrain as run

    run(out, data, clips, steps, seed, model_type)


def quickstart(out: Path = Path("runs/quickstart"), /) -> None:
    """The whole method on the micro world, in minutes on a CPU; safe to interrupt and run again.

    Args:
        out: Folder for data, checkpoints and report.
    """
    from storm_vlm.lab.quickstart import quickstart as run

    run(out, console)


def reproduce(
    folder: Path | None = None,
    /,
    *,
    out: Path | None = None,
    table: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    fast: Annotated[bool, Switch] = False,
    seeds: PositiveInt | None = None,
    steps: Annotated[int | None, Parameter(validator=validators.Number(gte=5))] = None,
    train_rows: Annotated[int | None, Parameter(validator=validators.Number(gte=16))] = None,
    jobs: PositiveInt = 2,
) -> None:
    """The paper's tables and figures on the micro world, with intervals; safe to interrupt and run again.

    Args:
        folder: For data, checkpoints and page; runs/reproduce, or -fast.
        out: For results.md, results/*.json and outcomes, which it goes on with; by default FOLDER.
        table: main, stages, targets, slot_inputs, sizes, latent_sizes or rows; repeat; by default all. Or studies
            beside them: few_rows, answers, wrong_thoughts, distorted_thoughts, own_slots, harder_split, second_world.
        fast: A rehearsal: all of it, too short to learn.
        seeds: By default 3.
        steps: Of every run; by default 1200.
        train_rows: By default 6000.
        jobs: Runs at a time, one thread each.
    """
    from dataclasses import replace

    from storm_vlm.data.output import exclusive
    from storm_vlm.lab.arms import STUDIES
    from storm_vlm.lab.reproduce.evidence import FAST, FULL, study
    from storm_vlm.lab.reproduce.evidence import reproduce as run
    from storm_vlm.lab.reproduce.evidence_page import verdicts

    plan = FAST if fast else FULL
    size = replace(
        plan.size, steps=steps or plan.size.steps, train_rows=train_rows or plan.size.train_rows
    )
    plan = replace(plan, size=size, seeds=seeds or plan.seeds)
    folder = folder or Path("runs/reproduce-fast" if fast else "runs/reproduce")
    command = "storm reproduce" + (" --fast" if fast else "")
    command += f" --seeds {plan.seeds} --steps {size.steps} --train-rows {size.train_rows}"
    command += "".join(f" --table {name}" for name in table)
    command += f" --out {out}" if out else ""
    studied, out = bool(table) and STUDIES.keys() >= set(table), out or folder
    with exclusive(folder):
        evidence = (study if studied else run)(folder, out, plan, table, jobs, command)
    for line in verdicts(evidence):
        show(line)
    made = out / "results" / "method.md" if studied else out / "results.md"
    show(f"wrote {made}" + ("" if studied else f" and {folder / 'report.html'}"))
