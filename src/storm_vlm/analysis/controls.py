"""The control arms that a claim for latents needs, made of anyone's own Stage I and Stage II (`docs/validity.md`).

Every arm takes the same rows and steps (one: the same FLOPs), and the factors of its learning rates are searched as
STORM's are, on validation rows with the first seed. Each step is a command that goes on after a kill; none is done
twice.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from storm_vlm.data.atomic_write import write_json, write_text
from storm_vlm.data.output import exclusive, refuse_input
from storm_vlm.data.prompt import answer_text, question_text
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.data.video import video_shape
from storm_vlm.errors import InputError, StormError
from storm_vlm.evaluation.compare import Gain, hits, overall
from storm_vlm.evaluation.run_folder import Run, read_run
from storm_vlm.evaluation.statistics import Estimate, mean_over_seeds
from storm_vlm.evaluation.verdict import verdict
from storm_vlm.pages import interval, points, share
from storm_vlm.training.config import TrainConfig, load_config
from storm_vlm.training.plan_request import PlanRequest
from storm_vlm.training.planning import plan

log = logging.getLogger(__name__)
RATE = 5e-5  # of transformers, where a config names none
CHAIN = 512  # tokens of a chain of thought
OURS = "storm"
Command = tuple[str, ...]


@dataclass(frozen=True)
class ControlArm:
    """What differs from STORM, in both stages and in Stage I alone."""

    name: str
    both: Mapping[str, Any] = field(default_factory=dict)
    stage1: Mapping[str, Any] = field(default_factory=dict)
    same_flops: bool = False  #: else the same steps
    plans: bool = False  #: answers are chains of thought


_OFF = {
    "method.latent_budget": 0,
    "method.alignment_weight": 0,
    "method.slot_input": "rollout",
    "method.bottleneck": "none",
}
_PAUSE = {"method.alignment_weight": 0, "method.slot_input": "pause"}
ARMS = {
    OURS: ControlArm("STORM, as configured"),
    "sft": ControlArm("weights-matched, latents disabled: SFT, same steps", _OFF),
    "sft_compute": ControlArm(
        "compute-matched, no latents: SFT, same FLOPs", _OFF, same_flops=True
    ),
    "cot": ControlArm("text chain of thought on the same plans", _OFF, plans=True),
    "pause": ControlArm("count-matched pause tokens", _PAUSE),
    "markers": ControlArm(
        "markers only (around one pause token)", _PAUSE | {"method.latent_budget": 1}
    ),
    "shuffled": ControlArm("shuffled targets", stage1={"method.target_source": "shuffled"}),
    "bottleneck": ControlArm("STORM, answers without the video", {"method.bottleneck": "answer"}),
}


class Trial(NamedTuple):
    """One training of both stages: an arm, what its learning rates are multiplied with, and a seed."""

    arm: str
    factor: float
    seed: int

    def folder(self, out: Path) -> Path:
        return out / self.arm / f"x{self.factor:g}-seed{self.seed}"


@dataclass(frozen=True)
class ArmResult:
    """On test rows, at the factor that was best on validation rows."""

    name: str
    validation: dict[float, float]  #: accuracy by factor
    factor: float
    accuracy: Estimate  #: over seeds and rows
    by_seed: list[float]  #: accuracy
    tokens: float  #: written for an answer
    gain: Gain | None  #: of STORM over this arm; None: it is STORM
    swapped: list[float]  #: accuracy with another clip's latents, of another answer, by seed
    verdicts: list[str]  #: on its latents, by seed


@dataclass(frozen=True)
class Study:
    """All that is compared. Paths are of the user's files."""

    stage1: Path
    stage2: Path
    validation: Path
    test: Path
    out: Path
    arms: tuple[str, ...] = tuple(ARMS)
    factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    seeds: int = 3

    def configs(self, trial: Trial) -> list[TrainConfig]:
        """Both stages. Raises ConfigError."""
        arm, here, configs = ARMS[trial.arm], trial.folder(self.out), []
        for name, file in (("stage1", self.stage1), ("stage2", self.stage2)):
            config = load_config(file)
            changes = {**arm.both, **(arm.stage1 if name == "stage1" else {})}
            rate = float(config.training.get("learning_rate", RATE)) * trial.factor
            changes |= {"training.learning_rate": rate, "training.seed": trial.seed}
            changes |= {"output_dir": str(here / name)}
            if configs:
                changes["model"] = configs[0].output_dir
            if arm.plans:
                changes["data"] = str(self.out / f"{name}-plans.jsonl")
            if arm.same_flops:
                changes |= longer(config, flops_ratio(file, load_config(self.stage1).model))
            configs.append(load_config(file, changes))
        return configs

    def commands(self, trial: Trial, rows: Path, split: str) -> list[Command]:
        """Train, and answer these rows; configs are written."""
        here, commands = trial.folder(self.out), []
        for config in self.configs(trial):
            file = here / f"{Path(config.output_dir).name}.yaml"
            write_text(file, yaml.safe_dump(config.model_dump(mode="json")))
            if not (Path(config.output_dir) / "versions.json").exists():
                commands.append(("train", str(file)))
        answer = ("evaluate", str(here / "stage2"), str(rows), "--out", str(here / split))
        if ARMS[trial.arm].plans:
            answer += ("--reasoner", "direct", "--max-new-tokens", str(CHAIN))
        elif split != "test":
            answer += ("--reliance-rows", "0")
        return [*commands, answer]


def controls(
    study: Study, launch: Callable[[Command, Path], None], jobs: int = 1
) -> dict[str, ArmResult]:
    """Search, choose, train the other seeds, compare; writes `controls.json` and `controls.md`.

    `launch` runs a command of `storm`, whose output goes to a file.

    Raises:
        StormError: a command failed.
    """
    for file in (study.stage1, study.stage2):
        refuse_input(study.out, [Path(load_config(file).data)])
    with exclusive(study.out):
        study = _with_plans(study)
        search = [Trial(arm, factor, 0) for arm in study.arms for factor in study.factors]
        _run(study, search, study.validation, "validation", launch, jobs)
        scores = {
            arm: {t.factor: _share(t, study) for t in search if t.arm == arm} for arm in study.arms
        }
        chosen = {
            arm: max(found, key=lambda factor: found[factor]) for arm, found in scores.items()
        }
        trials = [Trial(a, chosen[a], seed) for seed in range(study.seeds) for a in study.arms]
        _run(study, trials, study.test, "test", launch, jobs)
        runs: dict[str, list[Run]] = {arm: [] for arm in study.arms}
        for trial in trials:
            runs[trial.arm].append(read_run(trial.folder(study.out) / "test"))
        results = {arm: _result(arm, scores[arm], chosen[arm], runs) for arm in study.arms}
        write_json(study.out / "controls.json", results)
        write_text(study.out / "controls.md", markdown(results))
        return results


@cache
def flops_ratio(file: Path, model: str) -> float:
    """FLOPs of a stage's step by those of SFT on the same rows, on `model`; encoding targets is counted each time.

    Raises LatentError for a backbone without an adapter.
    """
    config = load_config(file)
    _, height, width = video_shape(read_rows(config.data)[0].video)
    method = config.method
    request = PlanRequest(
        num_frames=config.num_frames,
        height=height,
        width=width,
        latent_budget=method.latent_budget,
        lora_rank=(config.lora or {}).get("r", 0),
        checkpointing=bool(config.training.get("gradient_checkpointing")),
    )
    steps = plan(model, request).steps
    ours = steps["Stage I" if method.slot_input in ("target", "pause") else "Stage II"]
    targets = method.num_target_frames / config.num_frames if method.needs_targets else 0.0
    return (ours.flops + targets * ours.vision_flops) / steps["SFT"].flops


def longer(config: TrainConfig, ratio: float) -> dict[str, Any]:
    """The steps, or epochs, that take `ratio` times as long."""
    steps = config.training.get("max_steps", -1)
    if steps > 0:
        return {"training.max_steps": round(steps * ratio)}
    return {"training.num_train_epochs": config.training.get("num_train_epochs", 3) * ratio}


def chain(row: Row) -> Row:
    """The row with its plan as a chain of thought, and the answer where the scorer looks for it."""
    answer = f"<answer>{answer_text(row)}</answer>"
    plan = (row.plan or "").removesuffix(f" The answer is {row.answer}.")
    thought = f"<think>{plan}</think>" if plan else ""
    asked = question_text(row.question, row.options)
    return row.model_copy(update={"question": asked, "options": (), "answer": thought + answer})


def _with_plans(study: Study) -> Study:
    """Write the rows of the chain-of-thought arm; without a plan, there is no such arm."""
    if "cot" not in study.arms:
        return study
    plans = 0
    for name, file in (("stage1", study.stage1), ("stage2", study.stage2)):
        rows = read_rows(load_config(file).data)
        plans += sum(row.plan is not None for row in rows)
        write_rows(study.out / f"{name}-plans.jsonl", [chain(row) for row in rows])
    if plans:
        return study
    log.warning("no row has a plan: the arm cot is left out")
    return replace(study, arms=tuple(arm for arm in study.arms if arm != "cot"))


def _run(
    study: Study,
    trials: Sequence[Trial],
    rows: Path,
    split: str,
    launch: Callable[[Command, Path], None],
    jobs: int,
) -> None:
    """All trials, `jobs` at a time; raises the first failure."""

    def one(work: tuple[Trial, list[Command]]) -> None:
        trial, commands = work
        for command in commands:
            log_file = f"{command[0]}-{Path(command[1]).stem}.log"
            launch(command, trial.folder(study.out) / log_file)

    work = [(trial, study.commands(trial, rows, split)) for trial in trials]
    pool = ThreadPoolExecutor(jobs)
    try:
        for number, (_, trial) in enumerate(zip(pool.map(one, work), trials, strict=True), 1):
            log.info("%s, %s of %s: %s", split, number, len(trials), " ".join(map(str, trial)))
    finally:  # after a failure, or Ctrl-C, nothing more is begun
        pool.shutdown(wait=False, cancel_futures=True)


def _share(trial: Trial, study: Study) -> float:
    records = read_run(trial.folder(study.out) / "validation").records
    return sum(record.correct for record in records) / len(records)


def _result(
    arm: str, scores: dict[float, float], factor: float, runs: Mapping[str, Sequence[Run]]
) -> ArmResult:
    mine = runs[arm]
    right = hits(mine, mine[0])
    relied = [run.reliance for run in mine if run.reliance]
    swaps = [one.interventions["swap_other_answer"].accuracy for one in relied]
    tokens = [record.reply.tokens for run in mine for record in run.records if record.reply]
    return ArmResult(
        name=ARMS[arm].name,
        validation=scores,
        factor=factor,
        accuracy=mean_over_seeds(right),
        by_seed=[float(seed) for seed in right.mean(1)],
        tokens=fmean(tokens),
        gain=overall(runs[OURS], mine) if arm != OURS and OURS in runs else None,
        swapped=[swap.mean for swap in swaps if swap],
        verdicts=[verdict(one).text for one in relied],
    )


def markdown(results: Mapping[str, ArmResult]) -> str:
    """Each arm with the factors that were tried; STORM against the best of the others."""
    columns = (
        "arm",
        "validation, by factor of the rate",
        "chosen",
        "test",
        "by seed",
        "STORM's gain, points",
        "with another clip's latents",
        "tokens",
    )
    lines = [columns, ("---",) * len(columns)]
    for one in results.values():
        tried = ", ".join(f"x{factor:g} {right:.1%}" for factor, right in one.validation.items())
        right = f"{share(one.accuracy)} ({interval(one.accuracy)})"
        seeds, swapped = (", ".join(map("{:.1%}".format, v)) for v in (one.by_seed, one.swapped))
        gain = _points(one.gain.difference) if one.gain else ""
        lines.append(
            (one.name, tried, f"x{one.factor:g}", right, seeds, gain, swapped, f"{one.tokens:.0f}")
        )
    parts = ["# Control arms", "Intervals (95%) are over seeds and clips."]
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    rivals = [one for arm, one in results.items() if one.gain and arm != "bottleneck"]
    if best := max(rivals, key=lambda one: one.accuracy.mean, default=None):
        assert best.gain
        gain = _points(best.gain.difference)
        parts.append(f"**STORM against the best of them ({best.name}): {gain} points.**")
    said = [f"- {one.name}: {text}" for one in results.values() for text in one.verdicts]
    return "\n\n".join([*parts, *(["\n".join(said)] if said else [])]) + "\n"


def _points(gain: Estimate) -> str:
    return f"{points(gain)} ({interval(gain)})"


class Processes:
    """Runs commands of `storm` as processes, behind a prefix such as `accelerate launch … --module storm_vlm`.

    Those that still run end with its block.
    """

    def __init__(self, prefix: Iterable[str] = ()) -> None:
        self.prefix = tuple(prefix) or (sys.executable, "-m", "storm_vlm")
        self._running: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in tuple(self._running):
            process.terminate()

    def __call__(self, command: Command, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as output:
            process = subprocess.Popen((*self.prefix, *command), stdout=output, stderr=output)
        self._running.add(process)
        code = process.wait()
        self._running.discard(process)
        if code:
            raise StormError(f"storm {command[0]} failed: see {file}")


def check(study: Study) -> None:
    """Raises InputError for a study that cannot be made; reads every config and all rows, before anything runs."""
    if unknown := set(study.arms) - set(ARMS):
        raise InputError(
            f"no arm is called {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}"
        )
    for config in (load_config(study.stage1), load_config(study.stage2)):
        if not config.method.latent_budget:
            raise InputError("Stage I and Stage II must have slots (method.latent_budget)")
        read_rows(config.data)
    for file in (study.validation, study.test):
        read_rows(file)
    for arm in study.arms:
        study.configs(Trial(arm, study.factors[0], 0))
