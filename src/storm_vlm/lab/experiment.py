"""The micro experiment: every arm at equal data and equal optimizer steps, over several seeds.

Each run leaves its outcomes, question by question, in a file of their own; a run that has one is not repeated, here
or on another machine, and one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from storm_vlm.analysis.reliance import KINDS, tamper
from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.errors import InputError
from storm_vlm.evaluation.exam import evaluate
from storm_vlm.evaluation.records import Record
from storm_vlm.evaluation.statistics import accuracy, mean_over_seeds, paired_difference
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.lab.arms import ARMS
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.backbone import deepen
from storm_vlm.lab.world.clips import build_world
from storm_vlm.lab.world.questions import REASONING_SHARE, answers
from storm_vlm.training.config import load_config
from storm_vlm.training.train import train
from storm_vlm.versions import commit, versions

CONTROLS: tuple[str, ...] = ("text_only", "one_frame", "shuffled_frames")
MICRO_CONFIGS = Path(__file__).parent / "configs"
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
    what = ARMS[arm]
    stages = []
    for stage in what.stages:
        settings = [f"training.max_steps={round(stage.share * size.steps)}", *stage.overrides]
        config = load_config(MICRO_CONFIGS / f"{stage.config}.yaml", settings)
        of_this_machine = {"model", "data", "output_dir"}
        said = config.model_dump(exclude=of_this_machine, exclude_defaults=True)
        stages.append({**said, "rows": stage.data})
    return {"start": what.start, "share_of_rows": what.rows, "stages": stages}


def run_arm(
    folder: Path, outcomes: Path, data: dict[str, Path], arm: str, seed: int, size: Size
) -> Result:
    """Train (in `folder`) and evaluate one arm with one seed; returns its outcomes, and keeps them in `outcomes`.

    `seconds` of a core is what it took, None where an earlier call had begun it.

    Raises:
        ValueError: there are outcomes, but of other settings.
    """
    result_file = _result_file(outcomes, arm, seed)
    if result_file.exists():
        return _read_result(result_file, size)
    began, here = time.process_time(), folder / f"{arm}-{seed}"
    begun = here.exists()
    what = ARMS[arm]
    checkpoint = data["deep"] if what.start == "deep" else shipped(what.start)
    for number, stage in enumerate(what.stages):
        output = here / f"{number}-{stage.config}"
        rows = data[stage.data]
        settings = [
            f"model={checkpoint}",
            f"data={rows}",
            f"target_cache={rows.with_suffix('.targets')}",
            f"vision_cache={rows.with_name('features')}",
            f"output_dir={output}",
            f"training.max_steps={round(stage.share * size.steps)}",
            f"training.seed={seed}",
            "training.save_strategy=steps",
            f"training.save_steps={SAVE_STEPS}",
            "training.save_total_limit=1",
            *stage.overrides,
        ]
        config = load_config(MICRO_CONFIGS / f"{stage.config}.yaml", settings)
        train(config, read_rows(rows)[: round(what.rows * size.train_rows)])
        for finished in output.glob("checkpoint-*"):
            shutil.rmtree(finished)
        checkpoint = output
    pipeline = StormPipeline.from_pretrained(str(checkpoint), device="cpu", cache_bytes=2**30)
    reasoner = Latent(pipeline, max_new_tokens=LONGEST_ANSWER)
    # Outcomes are for other machines, too: no path of this one.
    named = str(checkpoint.relative_to(folder)) if what.trained else checkpoint.name
    result: Result = {"arm": arm, "seed": seed, "checkpoint": named}
    result |= {"commit": commit(), "recipe": recipe(arm, size)}
    for split in ("test", "ood"):
        rows = read_rows(data[split])
        result[split] = [_outcome(r) for r in evaluate(reasoner, rows, reasoner.frames, 100)]
    if what.latent:
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


def read_results(outcomes: Path, size: Size) -> dict[str, list[Result]]:
    """All runs that the folder holds outcomes of, by arm, in the order of their seeds.

    Raises:
        ValueError: a run was made with other settings than it would be made with now.
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


def build_data(folder: Path, size: Size, arms: Iterable[str] = ()) -> dict[str, Path]:
    """The rows of all splits, and what only some arms need: clips that go on, plans as answers, a deep backbone."""
    counts = {"train": size.train_rows, "test": size.test_rows, "ood": size.ood_rows}
    data = {
        split: build_world(folder, "reasoning", split, count)  # type: ignore[arg-type]
        for split, count in counts.items()
    }
    wanted = {stage.data for arm in arms for stage in ARMS[arm].stages}
    if "train_continued" in wanted:
        data["train_continued"] = build_world(
            folder, "reasoning", "train", size.train_rows, continued=True
        )
    if "train_plans" in wanted:
        data["train_plans"] = data["train"].with_name("reasoning-train-0-plans.jsonl")
        rows = read_rows(data["train"])
        chains = [row.model_copy(update={"answer": _chain(row)}) for row in rows]
        write_rows(data["train_plans"], chains)
    if any(ARMS[arm].start == "deep" for arm in arms):
        data["deep"] = deepen(shipped("backbone"), folder / "deep", DEEP_LAYERS)
    return data


def _chain(row: Row) -> str:
    """The oracle's plan as a chain of thought, and the answer where the scorer looks for it."""
    plan = str(row.plan).removesuffix(f" The answer is {row.answer}.")
    return f"<think>{plan}</think><answer>{row.answer}</answer>"


def _start_worker() -> None:
    """One thread for each run; and none outlives its parent, or a second call would meet it at work."""
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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
    data = build_data(folder / "data", size, missing)
    work = [(folder, outcomes, data, arm, seed, size) for seed in seeds for arm in arms]
    if jobs == 1:
        return [run_arm(*job) for job in work]
    # Workers read it when they import tqdm: bars of several runs would write over each other.
    os.environ["TQDM_DISABLE"] = "1"
    context = multiprocessing.get_context("spawn")
    results = []
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:
        futures = [pool.submit(run_arm, *job) for job in work]
        for future in tqdm(as_completed(futures), "runs", total=len(futures)):
            results.append(result := future.result())
            tqdm.write(
                f"{result['arm']}, seed {result['seed']}: {np.mean(hits(result['test'])):.1%}"
            )
    return results


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
    for control in CONTROLS if sft else ():
        found[control] = accuracy([hit for result in sft for hit in result[control]])
    return found


def chance() -> float:
    """Accuracy of a uniform guess among a family's answers."""
    return sum(share / len(answers(family)) for family, share in REASONING_SHARE.items())


def summarize(
    results: Sequence[dict[str, Any]],
    data: dict[str, Path],
    command: str,
    wanted: Sequence[str] = (),
) -> dict[str, Any]:
    """The figures for the record; `wanted` arms without a result are None."""
    test = read_rows(data["test"])
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        by_arm.setdefault(result["arm"], []).append(result)
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
    for arm, runs in by_arm.items():
        found = mean_over_seeds([hits(run["test"]) for run in runs])
        summary[arm] = found.mean
        summary[f"{arm}_seeds"] = [run["seed"] for run in runs]
        summary[f"{arm}_interval"] = [found.low, found.high]
        summary[f"{arm}_ood"] = accuracy([o["correct"] for run in runs for o in run["ood"]])
        summary[f"{arm}_by_family"] = {
            family: accuracy(
                [o["correct"] for run in runs for o in run["test"] if o["family"] == family]
            )
            for family in REASONING_SHARE
        }
        if ARMS[arm].latent:
            tampered = [run["tampered"] for run in runs]
            fed = {kind: [hit for run in tampered for hit in run["right"][kind]] for kind in KINDS}
            fed["follows"] = [hit for run in tampered for hit in run["follows"]]
            for kind, outcomes in fed.items():
                known = [hit for hit in outcomes if hit is not None]
                summary[f"{arm}_{kind}"] = accuracy(known) if known else None
            counts = [o["slots_used"] for run in runs for o in run["test"]]
            summary[f"{arm}_slots_used"] = sum(counts) / len(counts)
            ends = [o["forced_end"] for run in runs for o in run["test"]]
            summary[f"{arm}_forced_end"] = accuracy(ends)
    reference = next((arm for arm in ("full", "stage1_only") if arm in by_arm), None)
    if reference is not None:
        summary[f"{reference}_swapped_latents"] = summary[f"{reference}_swap_other_answer"]
        for other in sorted(set(by_arm) - {reference}):
            ours, theirs = _paired(by_arm[reference], by_arm[other])
            summary[f"{reference}_minus_{other}"] = paired_difference(ours, theirs)
    summary |= {arm: None for arm in wanted if arm not in by_arm}  # not measured
    perception = json.loads((shipped("backbone") / "perception.json").read_text())
    summary |= {"perception": perception["all"], "perception_one_ball": perception["one"]}
    return summary


def _paired(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> tuple[list[list[float]], list[list[float]]]:
    """Hits of two arms' runs, seed by seed; an arm that is not trained has one run, which stands for every seed."""
    by_seed = {run["seed"]: run for run in theirs}
    if not ARMS[theirs[0]["arm"]].trained:
        by_seed = {run["seed"]: theirs[0] for run in ours}
    shared = [run for run in ours if run["seed"] in by_seed]
    return [hits(r["test"]) for r in shared], [hits(by_seed[r["seed"]]["test"]) for r in shared]


def hits(outcomes: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 for a right answer; what could not be parsed is wrong."""
    return [float(bool(outcome["correct"])) for outcome in outcomes]
