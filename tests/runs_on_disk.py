"""Runs made up with known answers, as files."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from storm_vlm.evaluation.records import Intervention, Movement, Record, Reliance, Sensitivity
from storm_vlm.evaluation.statistics import Estimate
from storm_vlm.inference.reply import Reply

OPTIONS = ("red", "green", "blue", "black")


def make_records(
    hit: Callable[[int], bool], n: int = 120, per_video: int = 3, seconds: float = 0.5
) -> list[Record]:
    """Question i of video i // per_video, of a short or a long one; its answer is right where `hit(i)`."""
    return [
        Record(
            id=f"q{i}",
            video=f"v{i // per_video}.mp4",
            groups={"duration": "short" if i % 4 else "long", "task_type": f"task {i % 3}"},
            answer=OPTIONS[i % 4],
            options=OPTIONS,
            reply=Reply(
                "ABCD"[i % 4 if hit(i) else (i + 1) % 4],
                tokens=2,
                slots_used=8,
                opened=True,
                seconds={"decode": 0.1, "prefill": 0.2, "total": seconds + 0.01 * (i % 5)},
            ),
            correct=hit(i),
            parsed=True,
            official=float(hit(i)),
        )
        for i in range(n)
    ]


def write_run(folder: Path, records: list[Record], shards: int = 1, **provenance: Any) -> Path:
    folder.mkdir(parents=True)
    said = {
        "benchmark": "videomme",
        "reasoner": "storm",
        "model": "m/7b",
        "n_expected": len(records),
    }
    (folder / "run.json").write_text(json.dumps({**said, "frames": {"n": 32}, **provenance}))
    for shard in range(shards):
        lines = [json.dumps(asdict(record)) + "\n" for record in records[shard::shards]]
        (folder / f"answers-{shard}.jsonl").write_text("".join(lines))
    return folder


def write_reliance(folder: Path, loss: float = 0.5, low: float = 0.4, n: int = 60) -> None:
    """What another clip's latents cost a run, made up; its own are right in four of five."""

    def share(mean: float, of: int = n) -> Estimate:
        return Estimate(mean, mean - 0.1, mean + 0.1, of)

    cost = Estimate(loss, low, 2 * loss - low, n - 5)
    swap = share(0.8 - loss, n - 5)
    lines = {
        "own": Intervention("own", share(0.8), share(0), share(0)),
        "swap_same_answer": Intervention("same", None, None, None),
        "swap_other_answer": Intervention(
            "other", swap, -cost, share(0.6), share(0.45), share(0.1)
        ),
        "removed": Intervention("none", share(0.2), share(-0.6), share(1)),
    }
    moved = Movement(1, 0.9, 1.1, n, (1.0,) * 8)
    found = Reliance(n, 120, 40, 8, lines, cost, Sensitivity(moved, moved))
    (folder / "reliance.json").write_text(json.dumps(asdict(found)))


def chance(rate: float, seed: int, n: int = 120) -> Callable[[int], bool]:
    drawn = np.random.default_rng(seed).random(n) < rate
    return lambda i: bool(drawn[i])
