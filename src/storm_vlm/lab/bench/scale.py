"""What more rows cost: CPU time and memory of a run's start, an import, a search for leaks, the filter, and a build.

Many rows share a few tiny clips, so that what is measured is the bookkeeping; a build decodes for every row, as it
always does. Every size is measured in a process of its own, and less what the fixed part (imports, weights, the clips
themselves) takes.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from storm_vlm.construction.build import run
from storm_vlm.construction.config import BuildConfig
from storm_vlm.construction.filters import PRINTED, Duplicates
from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.check import RowFile
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.datasets.leaks import find_leaks
from storm_vlm.datasets.transfer import export_rows, import_rows
from storm_vlm.lab.bench.peak import peak_mib
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.versions import commit, versions

CLIPS = 16
SHARED, BARE, FOREIGN, OTHER = "rows.jsonl", "bare.jsonl", "foreign.jsonl", "validation.jsonl"


@dataclass(frozen=True)
class ScaleCost:
    """Of one number of rows: CPU seconds of all threads, and MiB that the process took at most."""

    rows: int
    cpu_seconds: float
    peak_mib: float


def bench_scale(
    sizes: Sequence[int], build_sizes: Sequence[int], results: Path | None = None
) -> dict[str, Any]:
    """`ScaleCost` of each verb at each size, and the exponents with which they grow (1: linear).

    `results` is a record that may hold other figures: they stay, and these become its "scale", each as soon as it is
    measured.
    """
    costs: dict[str, list[ScaleCost]] = {verb: [] for verb in VERBS}
    with TemporaryDirectory() as name:
        folder = Path(name)
        scenes = read_rows(build_world(folder, "reasoning", "train", CLIPS))
        others = read_rows(build_world(folder, "reasoning", "validation", CLIPS))
        write_rows(folder / OTHER, others)
        # The first fills the caches, the second is the fixed part.
        for count in (CLIPS, CLIPS, *sorted({*sizes, *build_sizes})):
            _prepare(folder, scenes, count)
            for verb in VERBS:
                if count in (CLIPS, *(build_sizes if verb == "build" else sizes)):
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        costs[verb].append(pool.submit(_measure, verb, folder, count).result())
                    if results is not None:
                        rest = json.loads(results.read_text()) if results.exists() else {}
                        write_json(results, {**rest, "scale": _report(costs)})
    return _report(costs)


def _report(costs: dict[str, list[ScaleCost]]) -> dict[str, Any]:
    """Of what has been measured so far."""
    found = {
        verb: {
            "fixed": asdict(fixed),
            "sizes": [asdict(cost) for cost in sizes],
            "exponents": _exponents(fixed, sizes[0], sizes[-1]),
        }
        for verb, (_, fixed, *sizes) in ((v, c) for v, c in costs.items() if c[2:])
    }
    return {"commit": commit(), "versions": versions(), **found}


def _exponents(fixed: ScaleCost, least: ScaleCost, most: ScaleCost) -> dict[str, float]:
    if least.rows == most.rows:
        return {}
    grown = {
        field: [max(getattr(c, field) - getattr(fixed, field), 1e-3) for c in (least, most)]
        for field in ("cpu_seconds", "peak_mib")
    }
    times = math.log(most.rows / least.rows)
    return {field: math.log(end / begin) / times for field, (begin, end) in grown.items()}


def _prepare(folder: Path, scenes: list[Row], count: int) -> None:
    def rows(**fields: Any) -> Iterator[Row]:
        for number in range(count):
            scene = scenes[number % CLIPS]
            asked = f"Clip {number}: {scene.question}"
            changes = {"id": f"row {number}", "question": asked, **fields}
            yield scene.model_copy(update=changes)

    write_rows(folder / SHARED, rows())
    write_rows(folder / BARE, rows(keyframes=(), plan=None, thought_video=None))
    export_rows("ms-swift", folder / SHARED, folder / FOREIGN)


def _measure(verb: str, folder: Path, count: int) -> ScaleCost:
    began = time.process_time()
    VERBS[verb](folder, count)
    return ScaleCost(count, time.process_time() - began, peak_mib())


def _start(folder: Path, _: int) -> None:
    from storm_vlm.training.arguments import training_arguments
    from storm_vlm.training.config import TrainConfig
    from storm_vlm.training.train import build_trainer, load_model

    fields = {
        "model": str(shipped("backbone")),
        "data": str(folder / SHARED),
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


def _import(folder: Path, _: int) -> None:
    import_rows("ms-swift", folder / FOREIGN, folder / "imported.jsonl", folder)


def _leaks(folder: Path, _: int) -> None:
    find_leaks(RowFile(folder / SHARED), RowFile(folder / OTHER), folder / "hashes")


def _filter(_: Path, count: int) -> None:
    random, earlier = np.random.default_rng(0), Duplicates(0.05)
    for clip in range(count):
        fingerprint = random.bytes(PRINTED * 64).hex()
        earlier.nearest(fingerprint, clip)
        earlier.add(fingerprint, clip)


def _build(folder: Path, _: int) -> None:
    config = BuildConfig.model_validate({"generator": "keyframes", "workers": 4})
    with TemporaryDirectory(dir=folder) as out:
        run(folder / BARE, out, config)


VERBS: dict[str, Callable[[Path, int], None]] = {
    "start": _start,
    "import": _import,
    "leaks": _leaks,
    "filter": _filter,
    "build": _build,
}
