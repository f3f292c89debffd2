"""What more rows cost before the first step: time and memory of a run's start, and of the duplicate filter.

Many rows share a few tiny clips, so that what is measured is the bookkeeping, not the decoding. Every size is
measured in a process of its own, and less what the fixed part (imports, weights, the clips themselves) takes.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from storm_vlm.construction.filters import PRINTED, Duplicates
from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.row import read_rows, write_rows
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.training.arguments import training_arguments
from storm_vlm.training.config import TrainConfig
from storm_vlm.training.train import build_trainer, load_model
from storm_vlm.versions import commit, versions

CLIPS = 16


@dataclass(frozen=True)
class ScaleCost:
    """Of one number of rows: seconds, and MiB that the process took at most."""

    rows: int
    start_seconds: float
    filter_seconds: float
    peak_mib: float


def bench_scale(sizes: Sequence[int], results: Path | None = None) -> dict[str, Any]:
    """A start and a filter at each size, and the exponents with which their costs grow (1: linear)."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        scenes = read_rows(build_world(folder, "reasoning", "train", CLIPS))
        costs = []
        # The first fills the caches, the second is the fixed part.
        for count in (CLIPS, CLIPS, *sizes):
            rows = (scenes[i % CLIPS].model_copy(update={"id": f"row {i}"}) for i in range(count))
            write_rows(folder / "rows.jsonl", rows)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                costs.append(pool.submit(_measure, folder, count).result())
    fixed, measured = costs[1], costs[2:]
    exponents = {}
    for field in ("start_seconds", "filter_seconds", "peak_mib"):
        grown = [max(getattr(cost, field) - getattr(fixed, field), 1e-3) for cost in measured]
        exponents[field] = math.log(grown[-1] / grown[0]) / math.log(sizes[-1] / sizes[0])
    report = {
        "commit": commit(),
        "versions": versions(),
        "fixed": asdict(fixed),
        "sizes": [asdict(cost) for cost in measured],
        "exponents": exponents,
    }
    if results is not None:
        write_json(results, report)
    return report


def _measure(folder: Path, count: int) -> ScaleCost:
    began = time.perf_counter()
    fields = {
        "model": str(shipped("backbone")),
        "data": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"),
        "num_frames": 4,
        "vision_cache": str(folder / "features"),
        "training": {"use_cpu": True, "train_sampling_strategy": "group_by_length"},
    }
    config = TrainConfig.model_validate(fields)
    trainer = build_trainer(
        config, training_arguments(config), *load_model(config), read_rows(config.data), []
    )
    next(iter(trainer.get_train_dataloader()))
    started = time.perf_counter()
    random, earlier = np.random.default_rng(0), Duplicates(0.05)
    for clip in range(count):
        fingerprint = random.bytes(PRINTED * 64).hex()
        earlier.nearest(fingerprint, clip)
        earlier.add(fingerprint, clip)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return ScaleCost(count, started - began, ended - started, peak)
