"""The same rows on Ray Data, with workers killed on the way."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
from kill_trials import bare_rows, stub_config
from stub_teacher import StubTeacher

from storm_vlm.construction.build import run
from storm_vlm.construction.ray_build import on_ray
from storm_vlm.data.store import Store


def kill_workers(store: Path, killed: list[str]) -> None:
    """Kill one task in the midst of asking the teacher and one generating actor, once some rows are through."""
    wanted = {"ray::Map(prepare)", "ray::MapWorker"}
    until = time.monotonic() + 60
    while wanted and time.monotonic() < until:
        for process in psutil.Process().children(recursive=True):
            try:
                name = " ".join(process.cmdline())
                found = next((title for title in wanted if name.startswith(title)), None)
                if found and any(Store(store).files("thoughts", ".mp4")):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(name)
                    wanted.remove(found)
            except (psutil.Error, OSError):
                continue
        time.sleep(0.02)


def test_ray_makes_the_same_rows_though_workers_die(tmp_path: Path) -> None:
    source = bare_rows(tmp_path, 8)
    killed: list[str] = []
    with StubTeacher(0.2) as teacher:
        config = stub_config(teacher, workers=2)
        run(source, tmp_path / "plain", config)
        calls = len(teacher.calls)
        args = (tmp_path / "ray" / "store", killed)
        killer = threading.Thread(target=kill_workers, args=args, daemon=True)
        killer.start()
        summary = run(source, tmp_path / "ray", config, work=on_ray("local"))
        killer.join()
        assert len(killed) == 2, killed
        assert summary["states"] == {"done": 8} and summary["unfinished"] == 0
        assert calls <= len(teacher.calls) - calls <= calls + 2  # what the killed task was asking
    for name in ("rows.jsonl", "rejects.jsonl"):
        made = [(tmp_path / way / name).read_bytes() for way in ("plain", "ray")]
        assert made[0] == made[1]
