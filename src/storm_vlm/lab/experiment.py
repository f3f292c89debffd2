"""The micro experiment: every arm at equal data and equal optimizer steps, over several seeds.

Each run leaves its outcomes, question by question, in a file of their own; a run that has one is not repeated, here
or on another machine, and one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from storm_vlm.analysis.controls import chain
from storm_vlm.analysis.reliance import tamper
from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.data.worker_pool import worker_pool
from storm_vlm.errors import InputError
from storm_vlm.evaluation.question_set import evaluate
from storm_vlm.evaluation.records import Record
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.lab.arms import ARMS, Stage
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.micro_config import micro_config
from storm_vlm.lab.thought_judge import with_visual_gain
from storm_vlm.lab.world.backbone import deepen
from storm_vlm.lab.world.clips import WORLDS, WorldName, build_world
from storm_vlm.lab.world.distorted import DISTORTIONS, with_distorted_thoughts
from storm_vlm.lab.world.generator import with_wrong_thoughts
from storm_vlm.lab.world.wrong import fault_of
from storm_vlm.training.train import train
from storm_vlm.versions import commit

CONTROLS: tuple[str, ...] = ("text_only", "one_frame", "shuffled_frames")
LONGEST_ANSWER = 128  # tokens; a chain of thought has about 90
DEEP_LAYERS = 6
SAVE_STEPS = 500  # a minute or two; of an interrupted run, no more is lost


@dataclass(frozen=True)
class Size:
    """How much data and how many optimizer steps (in all, whatever the arm)."""

    train_rows: int
    test_rows: int
    ood_rows: int
    steps: int


Result = dict[str, Any]


def recipe(arm: str, size: Size) -> dict[str, Any]:
    """What decides a run's outcomes beside seed, rows and code: where it starts, and every stage's settings."""
    design = ARMS[arm]
    of_this_machine = {"model", "data", "output_dir"}
    stages = []
    for stage in design.stages:
        config = micro_config(stage.config, stage.overrides, max_steps=_steps(stage, size))
        settings = config.model_dump(exclude=of_this_machine, exclude_defaults=True)
        stages.append({**settings, "rows": stage.data})
    start = recipe(design.after, size) if design.after else design.start
    made = {"start": start, "share_of_rows": design.rows, "stages": stages}
    return made if design.world == "mirrors" else {"world": design.world, **made}


def _steps(stage: Stage, size: Size) -> int:
    return max(1, round(stage.share * size.steps))


def run_arm(
    folder: Path, outcomes: Path, data: dict[str, Path], arm: str, seed: int, size: Size
) -> Result:
    """Train (in `folder`) and evaluate one arm with one seed; returns its outcomes, and keeps them in `outcomes`.

    `seconds` of a core is what it took, None where an earlier call had begun it.

    Raises:
        InputError: there are outcomes, but of other settings.
    """
    result_file = _result_file(outcomes, arm, seed)
    if result_file.exists():
        return _read_result(result_file, size)
    began, begun = time.process_time(), (folder / f"{arm}-{seed}").exists()
    design, checkpoint = ARMS[arm], train_arm(folder, data, arm, seed, size)
    pipeline = StormPipeline.from_pretrained(str(checkpoint), device="cpu", cache_bytes=2**30)
    reasoner = Latent(pipeline, max_new_tokens=LONGEST_ANSWER)
    # Outcomes are for other machines, too: no path of this one.
    named = str(checkpoint.relative_to(folder)) if design.trained else checkpoint.name
    result: Result = {"arm": arm, "seed": seed, "checkpoint": named}
    result |= {"commit": commit(), "recipe": recipe(arm, size)}
    for split in ("test", "ood"):
        rows = read_rows(data[split])
        result[split] = [_outcome(r) for r in evaluate(reasoner, rows, reasoner.frames, 100)]
    if design.latent:
        tampered, _ = tamper(pipeline, read_rows(data["test"]), batch_size=100)
        result["tampered"] = asdict(tampered)
    if arm == "sft":
        rows = read_rows(data["test"])
        for control in CONTROLS:
            records = evaluate(reasoner, rows, reasoner.frames, 100, control)
            result[control] = [record.correct for record in records]
    result["seconds"] = None if begun else round(time.process_time() - began)
    with in_one_step(result_file) as unfinished:
        unfinished.write_bytes(gzip.compress(json.dumps(result).encode(), mtime=0))
    return result


def train_arm(folder: Path, data: dict[str, Path], arm: str, seed: int, size: Size) -> Path:
    """The checkpoint after the arm's last stage; what is trained already is left as it is."""
    design = ARMS[arm]
    if design.after:
        # Arms that start from one and the same wait for each other.
        with FileLock(folder / f".{design.after}-{seed}.lock"):
            checkpoint = train_arm(folder, data, design.after, seed, size)
    else:
        checkpoint = data["deep"] if design.start == "deep" else shipped(design.start)
    for number, stage in enumerate(design.stages):
        output, rows = folder / f"{arm}-{seed}" / f"{number}-{stage.config}", data[stage.data]
        config = micro_config(
            stage.config,
            stage.overrides,
            rows,
            max_steps=_steps(stage, size),
            seed=seed,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=1,
        ).model_copy(update={"model": str(checkpoint), "output_dir": str(output)})
        train(config, read_rows(rows)[: round(design.rows * size.train_rows)])
        for finished in output.glob("checkpoint-*"):
            shutil.rmtree(finished)
        checkpoint = output
    return checkpoint


def read_results(outcomes: Path, size: Size) -> dict[str, list[Result]]:
    """All runs that the folder holds outcomes of, by arm, in the order of their seeds.

    Raises:
        InputError: a run was made with other settings than it would be made with now.
    """
    found: dict[str, list[Result]] = {}
    for file in outcomes.glob("*.json.gz"):
        run = _read_result(file, size)
        found.setdefault(run["arm"], []).append(run)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in found.items()}


def _result_file(outcomes: Path, arm: str, seed: int) -> Path:
    return outcomes / f"{arm}-{seed}.json.gz"


def _read_result(file: Path, size: Size) -> Result:
    run = json.loads(gzip.decompress(file.read_bytes()))
    if run["recipe"] != (now := recipe(run["arm"], size)):
        raise InputError(
            f"{file} was made with {run['recipe']}, but the settings are now {now}: "
            "delete it to have the run done again, in an empty folder"
        )
    return run


def _outcome(record: Record) -> dict[str, Any]:
    """What the figures need of a record; `correct` is None where the answer could not be parsed."""
    assert record.reply is not None
    return {
        "id": record.id,
        "family": record.groups.get("family", "all"),
        "prediction": record.reply.text,
        "answer": record.answer,
        "correct": record.correct if record.parsed else None,
        "tokens": record.reply.tokens,
        "slots_used": record.reply.slots_used,
        "forced_end": record.reply.forced_end,
    }


def _thoughts_for(rows: list[Row], folder: Path, share: float) -> list[Row]:
    """Only the first rows, a share of them, have thought videos."""
    first = round(share * len(rows))
    return [
        *rows[:first],
        *(row.model_copy(update={"thought_video": None}) for row in rows[first:]),
    ]


def _without_wrong_thoughts(rows: list[Row], folder: Path, share: float) -> list[Row]:
    """Without the thought videos that are wrong in `with_wrong_thoughts`."""
    return [
        row.model_copy(update={"thought_video": None}) if fault_of(row.id, share) else row
        for row in rows
    ]


def _without_wrong_rows(rows: list[Row], folder: Path, share: float) -> list[Row]:
    return [row for row in rows if not fault_of(row.id, share)]


def _with_all_slots(row: Row) -> Row:
    """The row with the whole thought video, in the model's K slots."""
    assert row.thought_video is not None
    thought = row.thought_video.model_copy(update={"end": None})
    return row.model_copy(update={"slots": None, "thought_video": thought})


# Training rows that are made of those of `train`; the folder is for videos that are only theirs.
DERIVED: dict[str, Callable[[list[Row], Path], list[Row]]] = {
    "train_all_slots": lambda rows, folder: [_with_all_slots(row) for row in rows],
    "train_plans": lambda rows, folder: [chain(row) for row in rows],
    "train_third": partial(_thoughts_for, share=1 / 3),
    "train_dropped_25": partial(_without_wrong_rows, share=0.25),
    "train_dropped_50": partial(_without_wrong_rows, share=0.5),
    "train_filtered_25": partial(_without_wrong_thoughts, share=0.25),
    "train_gained_25": lambda rows, folder: with_visual_gain(
        with_wrong_thoughts(rows, folder, 0.25), folder
    ),
    **{f"train_{how}": partial(with_distorted_thoughts, how=how) for how in DISTORTIONS},
    "train_wrong_10": partial(with_wrong_thoughts, share=0.1),
    "train_wrong_25": partial(with_wrong_thoughts, share=0.25),
    "train_wrong_50": partial(with_wrong_thoughts, share=0.5),
}


def build_data(
    folder: Path, size: Size, arms: Iterable[str] = (), world: WorldName = "mirrors"
) -> dict[str, Path]:
    """The rows of all splits, and what only some arms need: clips that go on, plans as answers, a deep backbone."""
    counts = {"train": size.train_rows, "test": size.test_rows, "ood": size.ood_rows}
    data = {
        split: build_world(folder, "reasoning", split, count, world=world)  # type: ignore[arg-type]
        for split, count in counts.items()
    }
    before = [earlier for arm in arms if (earlier := ARMS[arm].after)]
    wanted = {stage.data for arm in (*arms, *before) for stage in ARMS[arm].stages}
    if "train_continued" in wanted:
        data["train_continued"] = build_world(
            folder, "reasoning", "train", size.train_rows, continued=True
        )
    for split in wanted & DERIVED.keys():
        name = split.removeprefix("train_").replace("_", "-")
        data[split] = data["train"].with_name(f"{data['train'].stem}-{name}.jsonl")
        write_rows(data[split], DERIVED[split](read_rows(data["train"]), folder / "wrong"))
    if any(ARMS[arm].start == "deep" for arm in arms):
        data["deep"] = deepen(shipped("backbone"), folder / "deep", DEEP_LAYERS)
    return data


def run_arms(
    folder: Path,
    outcomes: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    size: Size,
    jobs: int,
) -> list[Result]:
    """All arms and seeds: one after the other on all cores, or `jobs` at a time on one core each."""
    missing = {a for a in arms for s in seeds if not _result_file(outcomes, a, s).exists()}
    data: dict[WorldName, dict[str, Path]] = {world: {} for world in WORLDS}
    for world in WORLDS:
        if needed := [arm for arm in missing if ARMS[arm].world == world]:
            data[world] = build_data(folder / "data", size, needed, world)
    work = [(folder, outcomes, data[ARMS[a].world], a, seed, size) for seed in seeds for a in arms]
    if jobs == 1 or not missing:
        return [run_arm(*job) for job in work]
    # An arm that starts from another waits for that to be there.
    first = [job for job in work if ARMS[job[3]].after is None]
    results = []
    with worker_pool(jobs) as pool:
        for ready in (first, [job for job in work if job not in first]):
            futures = [pool.submit(run_arm, *job) for job in ready]
            for future in tqdm(as_completed(futures), "runs", total=len(futures)):
                results.append(result := future.result())
                right = np.mean(hits(result["test"]))
                tqdm.write(f"{result['arm']}, seed {result['seed']}: {right:.1%}")
    return results


def hits(outcomes: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 for a right answer; what could not be parsed is wrong."""
    return [float(bool(outcome["correct"])) for outcome in outcomes]
