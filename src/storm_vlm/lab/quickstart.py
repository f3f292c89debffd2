"""The whole method in one sitting, by the verbs that every user has: `world`, `train`, `evaluate`.

SFT and STORM are made side by side, each by processes of one thread. What an earlier call finished in the same folder
is not done again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from storm_vlm.data.atomic_write import write_json, write_text
from storm_vlm.data.output import exclusive
from storm_vlm.errors import StormError
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.micro_config import micro_config
from storm_vlm.lab.quickstart_page import write_page
from storm_vlm.lab.world.clips import build_world

PATIENCE = 1.0  # seconds for processes to end by themselves
BAR = re.compile(r"(\d+)/(\d+) \[[^<\]]*<([^,\]]*)")  # of tqdm: done, total, time left


@dataclass(frozen=True)
class QuickstartSize:
    """Rows, and optimizer steps of each stage; SFT takes as many as both stages together."""

    train_rows: int = 2000
    test_rows: int = 400
    stage1_steps: int = 1300
    stage2_steps: int = 60


@dataclass(frozen=True)
class Task:
    """One command of a system, and what people call it."""

    name: str
    command: tuple[str, ...]


def quickstart(folder: Path, console: Console, size: QuickstartSize | None = None) -> None:
    """Write clips, train and evaluate both systems, and write `report.html` into `folder`.

    Raises StormError if a process fails; names its log.
    """
    size, began = size or QuickstartSize(), time.perf_counter()
    console.print(f"Quickstart in {folder}. Interrupt it and call it again as you like.")
    with exclusive(folder):
        train, test = (
            build_world(folder / "data", "reasoning", split, count)  # type: ignore[arg-type]
            for split, count in (("train", size.train_rows), ("test", size.test_rows))
        )
        systems = plan(folder, train, test, size)
        run_side_by_side(systems, folder, console)
    page, sentence = write_page(folder, test, _spent(folder, time.perf_counter() - began))
    clip = next((folder / "data" / "clips").glob("reasoning-test-*.mp4"))
    console.print(
        f"{sentence}\nReport: {page}\nAsk it yourself:\n"
        f'  storm answer {clip} "Where will the ball be after 5 more steps?" --checkpoint {folder / "storm"} --json',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _spent(folder: Path, seconds: float) -> str:
    """What all calls together took, in words; `seconds` is this one's."""
    cores = sum(
        os.times()[:4]
    )  # user and system time, of this process and of those that it waited for
    kept = folder / "time.json"
    known = json.loads(kept.read_text()) if kept.exists() else {"seconds": 0, "core_seconds": 0}
    spent = {
        "seconds": known["seconds"] + seconds,
        "core_seconds": known["core_seconds"] + cores,
    }
    write_json(kept, spent)
    wall, core = (spent[key] / 60 for key in ("seconds", "core_seconds"))
    return f"{wall:.1f} minutes ({core:.1f} minutes of a core)"


def plan(folder: Path, train: Path, test: Path, size: QuickstartSize) -> dict[str, list[Task]]:
    """The commands of each system; their configs are written into `folder`, for people to read and change."""
    backbone, stage1 = str(shipped("backbone")), str(folder / "stage1")
    stages = {
        "sft": (backbone, size.stage1_steps + size.stage2_steps, folder / "sft"),
        "stage1": (backbone, size.stage1_steps, folder / "stage1"),
        "stage2": (stage1, size.stage2_steps, folder / "storm"),
    }
    for name, (model, steps, output) in stages.items():
        # Targets to the end of Stage I: the steps are too few to change over to own states (`dev/LOG.md`).
        overrides = ("method.slot_input=target",) if name == "stage1" else ()
        config = micro_config(
            name, overrides, train, max_steps=steps, seed=0, save_strategy="steps", save_steps=100
        ).model_copy(update={"model": model, "output_dir": str(output)})
        write_text(folder / f"{name}.yaml", yaml.safe_dump(config.model_dump(mode="json")))

    def storm(*arguments: str | Path) -> tuple[str, ...]:
        return (sys.executable, "-m", "storm_vlm", *map(str, arguments))

    def answers(system: str) -> Task:
        out = ("--out", folder / "answers" / system, "--batch-size", "50")
        return Task("answers", storm("evaluate", folder / system, test, *out))

    return {
        "SFT": [Task("training", storm("train", folder / "sft.yaml")), answers("sft")],
        "STORM": [
            Task("Stage I", storm("train", folder / "stage1.yaml")),
            Task("Stage II", storm("train", folder / "stage2.yaml")),
            answers("storm"),
        ],
    }


def run_side_by_side(systems: Mapping[str, Sequence[Task]], folder: Path, console: Console) -> None:
    """The tasks of each system one after the other, the systems at the same time, with a bar for each.

    Whatever ends this call ends their processes. Raises StormError if one fails.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=None, left="") for name in systems}
        processes: list[subprocess.Popen[bytes]] = []
        ongoing = {name: _states(name, tasks, folder, processes) for name, tasks in systems.items()}
        try:
            while ongoing:
                time.sleep(0.2)
                for name, states in list(ongoing.items()):
                    state = next(states, None)
                    if state is None:
                        del ongoing[name]
                        progress.update(
                            bars[name], description=f"{name}: done", completed=1, total=1, left=""
                        )
                    else:
                        what, done, total, left = state
                        progress.update(
                            bars[name], description=what, completed=done, total=total, left=left
                        )
        finally:
            end(processes)


State = tuple[str, int, int | None, str]  # what is done, how many of how many, time left


def _states(
    name: str, tasks: Sequence[Task], folder: Path, processes: list[subprocess.Popen[bytes]]
) -> Iterator[State]:
    """Run the tasks, and put their processes into the list; yields how far they are, as often as it is asked."""
    log = folder / f"{name.lower()}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, task in enumerate(tasks, 1):
        with log.open("wb") as file:
            process = subprocess.Popen(
                task.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment
            )
        processes.append(process)
        while (code := process.poll()) is None:
            what = f"{name}: {task.name} ({number} of {len(tasks)})"
            found = BAR.findall(log.read_bytes()[-2000:].decode(errors="replace"))
            done, total, left = found[-1] if found else ("0", "", "")
            yield what, int(done), int(total) if total else None, left and f"{left} left"
        if code:
            raise StormError(f"{name}, {task.name}: failed with exit code {code}: see {log}")


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end, and make those that do not."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
