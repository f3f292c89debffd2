"""The micro experiment: every arm at equal data and equal optimizer steps, over several seeds.

An arm is a list of stages; a stage is a shipped YAML file. Each run leaves a `result.json`; a run that has
one is not repeated, so the experiment can be interrupted and continued.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from storm_vlm.data.files import write_json
from storm_vlm.data.schema import Row, read_rows
from storm_vlm.evaluation.controls import Control
from storm_vlm.evaluation.evaluate import evaluate_interventions
from storm_vlm.evaluation.exam import evaluate
from storm_vlm.evaluation.reasoners import Latent
from storm_vlm.evaluation.records import Record
from storm_vlm.evaluation.statistics import accuracy, confidence_interval, paired_difference
from storm_vlm.pipeline import StormPipeline
from storm_vlm.training.config import load_config
from storm_vlm.training.train import train
from storm_vlm.versions import commit, versions
from storm_vlm.world.build import build_world
from storm_vlm.world.checkpoints import shipped
from storm_vlm.world.questions import REASONING_SHARE, answers


@dataclass(frozen=True)
class Stage:
    """A shipped config, its share of the arm's optimizer steps, and what is different in this arm."""

    config: str
    share: float = 1.0
    overrides: tuple[str, ...] = ()
    data: str = "train"


def _aligned_to(source: str, data: str = "train") -> list[Stage]:
    return [Stage("stage1", overrides=(f"method.target_source={source}",), data=data)]


# Every arm sees the same rows for the same number of optimizer steps.
ARMS: dict[str, list[Stage]] = {
    "base": [],
    "sft": [Stage("sft")],
    "pause": [Stage("pause")],
    "stage1_only": [Stage("stage1")],
    "stage2_only": [Stage("stage2_only")],
    "full": [Stage("stage1", 0.8), Stage("stage2", 0.2)],
    "future": _aligned_to("future", data="train_continued"),
    "keyframes": _aligned_to("keyframes"),
    "self_distilled": _aligned_to("self_distilled"),
    "shuffled": _aligned_to("shuffled"),
}
TARGET_ARMS = ("future", "keyframes", "self_distilled", "shuffled")
Comparison = Literal["stages", "targets"]
COMPARISONS: dict[Comparison, list[str]] = {
    "stages": [arm for arm in ARMS if arm not in TARGET_ARMS],
    "targets": ["sft", "pause", "stage1_only", *TARGET_ARMS],
}
CONTROLS: tuple[Control, ...] = ("text_only", "one_frame", "shuffled_frames")
MICRO_CONFIGS = Path(__file__).parent / "configs"
LATENT_ARMS = ("stage1_only", "stage2_only", "full", "shipped", *TARGET_ARMS)


@dataclass(frozen=True)
class Size:
    """How much data and how many optimizer steps (in all, whatever the arm)."""

    train_rows: int = 4000
    test_rows: int = 400
    ood_rows: int = 200
    steps: int = 3000


def run_arm(folder: Path, data: dict[str, Path], arm: str, seed: int, size: Size) -> dict[str, Any]:
    """Train and evaluate one arm with one seed; returns (and keeps) its outcomes. `shipped` is not trained."""
    result_file = folder / f"{arm}-{seed}" / "result.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    checkpoint = shipped("storm" if arm == "shipped" else "backbone")
    for number, stage in enumerate(ARMS.get(arm, [])):
        output = result_file.parent / f"{number}-{stage.config}"
        if not (output / "versions.json").exists():  # the last file that training writes
            config = load_config(
                MICRO_CONFIGS / f"{stage.config}.yaml",
                [
                    f"model={checkpoint}",
                    f"data={data[stage.data]}",
                    f"output_dir={output}",
                    f"training.max_steps={round(stage.share * size.steps)}",
                    f"training.seed={seed}",
                    *stage.overrides,
                ],
            )
            train(config)
        checkpoint = output
    pipeline = StormPipeline.from_pretrained(str(checkpoint), device="cpu")
    pipeline.collator.videos.cache_bytes = 2**30
    reasoner = Latent(pipeline)
    result: dict[str, Any] = {"arm": arm, "seed": seed, "checkpoint": str(checkpoint)}
    for split in ("test", "ood"):
        rows = read_rows(data[split])
        result[split] = [_outcome(r) for r in evaluate(reasoner, rows, reasoner.frames, 100)]
        if arm in LATENT_ARMS:
            result[f"{split}_interventions"] = evaluate_interventions(pipeline, rows, 100)
    if arm == "sft":
        rows = read_rows(data["test"])
        for control in CONTROLS:
            records = evaluate(reasoner, rows, reasoner.frames, 100, control)
            result[control] = [record.correct for record in records]
    write_json(result_file, result)
    return result


def _outcome(record: Record) -> dict[str, Any]:
    """What the figures need of a record; `correct` is None where the answer could not be parsed."""
    assert record.reply is not None
    return {
        "id": record.id,
        "family": record.groups.get("family", "all"),
        "prediction": record.reply.text,
        "answer": record.answer,
        "correct": record.correct if record.parsed else None,
        "slots_used": record.reply.slots_used,
        "forced_end": record.reply.forced_end,
    }


def build_data(folder: Path, size: Size, arms: Iterable[str] = ()) -> dict[str, Path]:
    """The reasoning rows of all splits; and, if one of the arms needs them, training clips that go on."""
    counts = {"train": size.train_rows, "test": size.test_rows, "ood": size.ood_rows}
    data = {
        split: build_world(folder, "reasoning", split, count)  # type: ignore[arg-type]
        for split, count in counts.items()
    }
    if any(stage.data == "train_continued" for arm in arms for stage in ARMS.get(arm, [])):
        data["train_continued"] = build_world(
            folder, "reasoning", "train", size.train_rows, continued=True
        )
    return data


def _start_worker() -> None:
    """One thread for each run; and none outlives its parent, or a second call would meet it at work."""
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run_arms(
    folder: Path, arms: Sequence[str], seeds: Sequence[int], size: Size, jobs: int
) -> list[dict[str, Any]]:
    """All arms and seeds: one after the other on all cores, or `jobs` at a time on one core each."""
    data = build_data(folder / "data", size, arms)
    work = [(folder, data, arm, seed, size) for arm in arms for seed in seeds]
    if jobs == 1:
        return [run_arm(*job) for job in work]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:
        futures = [pool.submit(run_arm, *job) for job in work]
        return [
            future.result() for future in tqdm(as_completed(futures), "runs", total=len(futures))
        ]


def shortcut_accuracies(
    rows: Sequence[Row], train_rows: Sequence[Row], sft: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Accuracy of ways to answer that simulate nothing; the last three ask the SFT models without the evidence."""
    counts: dict[str, dict[str, int]] = {}
    for row in train_rows:
        family = counts.setdefault(row.meta["family"], {})
        family[row.answer] = family.get(row.answer, 0) + 1
    majority = {
        family: max(count, key=lambda answer: count[answer]) for family, count in counts.items()
    }
    found = {"majority": accuracy([majority[row.meta["family"]] == row.answer for row in rows])}
    for name in ("last_seen", "straight_line"):
        found[name] = accuracy([row.meta["shortcuts"][name] == row.answer for row in rows])
    for control in CONTROLS:
        found[control] = accuracy([hit for result in sft for hit in result[control]])
    return found


def chance() -> float:
    """Accuracy of a uniform guess among a family's answers."""
    return sum(share / len(answers(family)) for family, share in REASONING_SHARE.items())


def summarize(
    results: Sequence[dict[str, Any]],
    data: dict[str, Path],
    command: str,
    wanted: Sequence[str] = COMPARISONS["stages"],
) -> dict[str, Any]:
    """The figures for the record; `wanted` arms without a result are None."""
    test = read_rows(data["test"])
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        by_arm.setdefault(result["arm"], []).append(result)
    hits = {arm: [_hits(run) for run in runs] for arm, runs in by_arm.items()}
    summary: dict[str, Any] = {
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "seeds": sorted({result["seed"] for result in results}),
        "n_test": len(test),
        "chance": chance(),
    }
    summary["shortcuts"] = shortcut_accuracies(
        test, read_rows(data["train"]), by_arm.get("sft", [])
    )
    summary["shortcut_best"] = max(summary["shortcuts"].values())
    for arm, outcomes in hits.items():
        summary[arm] = _mean(outcomes)
        summary[f"{arm}_seeds"] = [run["seed"] for run in by_arm[arm]]
        summary[f"{arm}_interval"] = confidence_interval([x for run in outcomes for x in run])
        summary[f"{arm}_ood"] = accuracy([o["correct"] for run in by_arm[arm] for o in run["ood"]])
        summary[f"{arm}_by_family"] = {
            family: accuracy(
                [o["correct"] for run in by_arm[arm] for o in run["test"] if o["family"] == family]
            )
            for family in REASONING_SHARE
        }
        if arm in LATENT_ARMS:
            runs = [run["test_interventions"] for run in by_arm[arm]]
            for kind in runs[0]:
                summary[f"{arm}_{kind}"] = _mean(
                    [[float(hit) for hit in run[kind]] for run in runs]
                )
            counts = [o["slots_used"] for run in by_arm[arm] for o in run["test"]]
            summary[f"{arm}_slots_used"] = sum(counts) / len(counts)
            ends = [o["forced_end"] for run in by_arm[arm] for o in run["test"]]
            summary[f"{arm}_forced_end"] = accuracy(ends)
    reference = next((arm for arm in ("full", "stage1_only") if arm in hits), None)
    if reference is not None:
        summary[f"{reference}_swapped_latents"] = summary[f"{reference}_swap_inputs"]
        for other in sorted(set(hits) - {reference}):
            ours, theirs = _paired(by_arm[reference], by_arm[other])
            summary[f"{reference}_minus_{other}"] = paired_difference(ours, theirs)
    summary |= {arm: None for arm in wanted if arm not in hits}  # not measured
    perception = json.loads((shipped("backbone") / "perception.json").read_text())
    summary |= {"perception": perception["all"], "perception_one_ball": perception["one"]}
    return summary


def run_experiment(
    folder: Path,
    results: Path,
    comparison: Comparison,
    arms: Sequence[str],
    seeds: Iterable[int],
    size: Size,
    jobs: int,
) -> None:
    """The named arms over `seeds`; writes the figures of all arms of the comparison in `folder` to `results`."""
    compared = COMPARISONS[comparison]
    arms = arms or compared
    if unknown := set(arms) - set(compared):
        raise ValueError(
            f"no arm of {comparison!r} is called {', '.join(sorted(unknown))}: choose from {', '.join(compared)}"
        )
    seeds = list(seeds)
    trained = [arm for arm in arms if ARMS[arm]]
    run_arms(folder, trained, seeds, size, jobs)
    if "base" in arms:  # untrained: it has no seed
        run_arms(folder, ["base"], seeds[:1], size, 1)
    # All that the folder holds, from earlier calls, too: arms can be measured one after the other.
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*/result.json"))]
    outcomes = [result for result in found if result["arm"] in compared]
    data = build_data(folder / "data", size)
    command = (
        f"storm micro --compare {comparison} --seeds {len(seeds)} --train-rows {size.train_rows} "
    )
    command += f"--test-rows {size.test_rows} --steps {size.steps} "
    command += " ".join(f"--arm {arm}" for arm in arms)
    write_json(results, summarize(outcomes, data, command, compared))


def _paired(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> tuple[list[list[float]], list[list[float]]]:
    """Hits of two arms' runs, seed by seed; an arm that is not trained has one run, which stands for every seed."""
    by_seed = {run["seed"]: run for run in theirs}
    if not ARMS.get(theirs[0]["arm"]):
        by_seed = {run["seed"]: theirs[0] for run in ours}
    shared = [run for run in ours if run["seed"] in by_seed]
    return [_hits(run) for run in shared], [_hits(by_seed[run["seed"]]) for run in shared]


def _hits(run: dict[str, Any]) -> list[float]:
    return [float(bool(outcome["correct"])) for outcome in run["test"]]


def _mean(outcomes: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, outcomes)) / sum(map(len, outcomes))
