"""Is anything lost or paid twice when data construction is killed, and how fast is it?

The tests do a few trials; `python tests/kill_trials.py docs/results/data.json` does many, for the record.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stub_teacher import StubTeacher
from tqdm.auto import tqdm

from storm_vlm.construction.build import in_threads, run
from storm_vlm.construction.config import BuildConfig
from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.row import read_rows, write_rows
from storm_vlm.data.store import Store
from storm_vlm.lab.world.clips import build_world
from storm_vlm.versions import commit, versions

STORED_WITHIN = 0.5  # seconds from the end of an answer to its being safe in the store
PRELOADED = ["storm_vlm.construction.build", "openai"]


def bench_build(
    results: Path | None, kills: int, rows: int, workers: list[int], latency: float, ray: bool
) -> dict[str, Any]:
    """Kill trials, the same rows on Ray, and rows per second by number of workers.

    Args:
        results: JSON file for the record; None writes none.
        latency: seconds that the stub teacher takes for each of a row's three calls.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = bare_rows(folder, rows)
        found: dict[str, Any] = kill_trials(source, folder / "kills", kills, random.Random(0))
        with StubTeacher(latency) as teacher:
            speeds = {}
            for count in workers:
                began = time.perf_counter()
                run(source, folder / f"workers{count}", stub_config(teacher, count))
                speeds[str(count)] = round(rows / (time.perf_counter() - began), 3)
            found["rows_per_second_by_workers"] = speeds
            if ray:
                found |= _ray_trial(source, folder, teacher)
    found |= {
        "rows": rows,
        "teacher_latency_s": latency,
        "teacher": "a stub on the same machine; no picture model and no video model take part",
        "generator": "keyframes",
        "cpu_cores": os.cpu_count(),
        "note": "all on one machine whose cores other work shares: speeds are a lower bound",
        "versions": versions(),
        "commit": commit(),
    }
    if results is not None:
        others = json.loads(results.read_text()) if results.exists() else {}
        write_json(results, {**others, **found})
    return found


def bare_rows(folder: Path, count: int) -> Path:
    """Rows of the micro world, each with a question of its own, and nothing yet of what construction makes."""
    rows = read_rows(build_world(folder / "world", "reasoning", "train", count))
    bare = {"keyframes": (), "plan": None, "thought_video": None}
    path = folder / "world" / "bare.jsonl"
    own = [{**bare, "question": f"Clip {i}: {row.question}"} for i, row in enumerate(rows)]
    write_rows(path, [row.model_copy(update=more) for row, more in zip(rows, own, strict=True)])
    return path


def stub_config(teacher: StubTeacher, workers: int = 4) -> BuildConfig:
    """Keyframes and plans by the stub, a slide show as thought video, all filters, one of which rejects."""
    return BuildConfig.model_validate(
        {
            "generator": "keyframes",
            "workers": workers,
            "teacher": {"model": "stub", "base_url": teacher.url},
            "filters": {"frozen": 0.85},
        }
    )


def kill_trials(source: Path, folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill builds of `source` at random moments, `kills` times; compare the outcome with an undisturbed build.

    Each build is started again until it ends, then the next one begins. `teacher_calls_repeated` are calls whose
    answer was in the store, or must have been: it had been used to ask on, or had had `STORED_WITHIN` seconds to
    get there. Calls that a kill cut off between server and store, which no client can help, are counted apart.
    """
    # Processes are forked from one that has everything imported: a kill should hit work, not imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    found: Counter[str] = Counter()
    with StubTeacher(latency=0.01) as teacher:
        config = stub_config(teacher).model_dump_json()

        def start(out: Path) -> Any:
            process = context.Process(target=_build, args=(str(source), str(out), config))
            process.start()
            return process

        reference = folder / "reference"
        start(folder / "warm").join()
        began = time.monotonic()
        start(reference).join()
        undisturbed = time.monotonic() - began
        while found["kills_tried"] < kills:
            out = folder / f"killed{found['builds_killed']}"
            found["builds_killed"] += 1
            teacher.calls.clear()
            trial = _Trial(out, teacher)
            while True:
                process = start(out)
                process.join(rng.uniform(0, 0.5 * undisturbed))
                if not process.is_alive() or found["kills_tried"] == kills:
                    process.join()
                    break
                killed_at = time.monotonic()
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
                found["kills_tried"] += 1
                teacher.settle()
                trial.note_kill(killed_at)
            teacher.settle()
            found += trial.count(reference)
            shutil.rmtree(out)
    names = ("rows_lost", "rows_duplicated", "rows_changed", "rejects_changed")
    names += ("teacher_calls_repeated", "teacher_calls_cut_off", "thought_videos_repeated")
    totals = {name: found[name] for name in ("kills_tried", "builds_killed", *names)}
    return {**totals, "rows_built_per_trial": len(_ids(reference / "rows.jsonl"))}


def _build(source: str, out: str, config: str) -> None:
    """In a process of its own."""
    tqdm.set_lock(threading.RLock())  # its default one, between processes, is left behind by a kill
    run(source, out, BuildConfig.model_validate_json(config))


class _Trial:
    """One build that is killed again and again, seen from outside: the server's calls and the files."""

    def __init__(self, out: Path, teacher: StubTeacher) -> None:
        self.out = out
        self.teacher = teacher
        self.known: dict[Path, tuple[int, int]] = {}  # files that were finished at some kill
        self.seen = 0  # calls up to the last kill
        self.finished: set[str] = set()  # keys of answers that may not be asked for again
        self.found: Counter[str] = Counter()

    def note_kill(self, killed_at: float) -> None:
        of_this_run = self.teacher.calls[self.seen :]
        self._look()
        self.finished |= {path.stem for path in Store(self.out / "store").files("teacher")}
        # Answered long before the kill, or used to ask on: must be in the store, whether it is or not.
        last = {call.question: call.key for call in of_this_run}
        for call in of_this_run:
            long_ago = call.sent is not None and call.sent < killed_at - STORED_WITHIN
            if long_ago or last[call.question] != call.key:
                self.finished.add(call.key)

    def _look(self) -> None:
        """Calls since the last look that repeat one; thought videos that were written again."""
        calls = list(self.teacher.calls)
        earlier = {call.key for call in calls[: self.seen]}
        for call in calls[self.seen :]:
            if call.key in self.finished:
                self.found["teacher_calls_repeated"] += 1
            elif call.key in earlier:
                self.found["teacher_calls_cut_off"] += 1
        fresh = Counter(
            call.key for call in calls[self.seen :]
        )  # nothing cuts off calls within a run
        self.found["teacher_calls_repeated"] += sum(fresh.values()) - len(fresh)
        self.seen = len(calls)
        for path in Store(self.out / "store").files("thoughts", ".mp4"):
            state = (path.stat().st_ino, path.stat().st_mtime_ns)
            self.found["thought_videos_repeated"] += self.known.setdefault(path, state) != state

    def count(self, reference: Path) -> Counter[str]:
        """After the last run: what differs from the undisturbed build."""
        self._look()
        wanted, got = (_ids(folder / "rows.jsonl") for folder in (reference, self.out))
        self.found["rows_lost"] += len((wanted - got).keys())
        self.found["rows_duplicated"] += sum(count - 1 for count in got.values())
        for name in ("rows", "rejects"):
            files = [(folder / f"{name}.jsonl").read_bytes() for folder in (reference, self.out)]
            self.found[f"{name}_changed"] += files[0] != files[1]
        return self.found


def _ids(path: Path) -> Counter[str]:
    return Counter(json.loads(line)["id"] for line in path.read_text().splitlines())


def _ray_trial(source: Path, folder: Path, teacher: StubTeacher) -> dict[str, Any]:
    """The same rows built on a local Ray cluster, without what the plain run has stored."""
    from storm_vlm.construction.ray_build import on_ray

    work: dict[str, Callable[..., Counter[str]]] = {"plain": in_threads, "ray": on_ray("local")}
    for name, how in work.items():
        run(source, folder / name, stub_config(teacher), work=how)
    plain, ray = ((folder / name / "rows.jsonl").read_bytes() for name in work)
    return {"ray_rows_equal": plain == ray}


if __name__ == "__main__":
    record = Path(sys.argv[1]) if sys.argv[1:] else None
    found = bench_build(record, 40, 48, [1, 2, 4, 8, 16], 0.1, ray=True)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
