"""`storm controls`: what would be there without latents?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt

from storm_vlm.cli.terminal import Switch, show

Repeated = Parameter(negative="")


def controls(
    stage1: Path,
    stage2: Path,
    /,
    *,
    validation: Path,
    test: Path,
    out: Path,
    arm: Annotated[tuple[str, ...], Repeated] = (),
    rate: Annotated[tuple[PositiveFloat, ...], Repeated] = (0.3, 1.0, 3.0),
    seeds: PositiveInt = 3,
    jobs: PositiveInt = 1,
    launch: str = "",
    dry_run: Annotated[bool, Switch] = False,
) -> None:
    """Train the control arms of your own Stage I and II, rates searched for each; safe to interrupt and run again.

    Args:
        stage1: A YAML file of Stage I.
        stage2: And of Stage II; its model is what Stage I makes.
        validation: Rows to choose learning rates on.
        test: Rows to compare on.
        out: Folder for configs, checkpoints, answers and controls.md.
        arm: storm, sft, sft_compute, cot, pause, markers, shuffled or bottleneck; repeat; by default all.
        rate: What the configs' learning rates are multiplied with; repeat.
        seeds: Of each arm, at its chosen rate.
        jobs: Commands at a time.
        launch: What starts `storm`, as "accelerate launch --num_processes 8 --module storm_vlm".
        dry_run: Print the commands of the search, write their configs, and train nothing.
    """
    from storm_vlm.analysis.controls import ARMS, Processes, Study, Trial, check
    from storm_vlm.analysis.controls import controls as run

    study = Study(stage1, stage2, validation, test, out, arm or tuple(ARMS), rate, seeds)
    check(study)
    if dry_run:
        for name in study.arms:
            for factor in study.factors:
                for command in study.commands(Trial(name, factor, 0), validation, "validation"):
                    show(shlex.join((*shlex.split(launch or "storm"), *command)))
        return
    with Processes(shlex.split(launch)) as processes:
        run(study, processes, jobs)
    show((out / "controls.md").read_text())
