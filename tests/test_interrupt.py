"""Ctrl-C and SIGTERM: seconds, the exit code, nothing new begun, no half files. Real signals to real processes."""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import pytest
from scripted_endpoint import serving

from storm_vlm.data.atomic_write import discard_half_files, in_one_step
from storm_vlm.data.row import read_rows, write_rows
from storm_vlm.data.thread_pool import GRACE, WAITING, Stopped, completed, proceed, thread_pool
from storm_vlm.data.worker_pool import worker_pool

SECONDS = 15.0  # a busy machine needs some; an answer that is not waited for would take 20


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "storm_vlm", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type]
    )


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + 120
    while not ready():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate())
        assert time.monotonic() < until
        time.sleep(0.02)


def stop(process: subprocess.Popen[str], number: int) -> str:
    """Signal the process's whole group; returns what it wrote to stderr."""
    began = time.monotonic()
    os.killpg(process.pid, number)
    _, printed = process.communicate(timeout=60)
    assert time.monotonic() - began < SECONDS, printed
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], printed
    assert "Traceback" not in printed
    return printed


def hidden(folder: Path) -> list[Path]:
    halves = [path for path in folder.rglob(".*") if not path.name.endswith("lock")]
    return halves + list(folder.rglob("unfinished/*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_world(tmp_path: Path, number: int) -> None:
    process = start("world", tmp_path, "--count", 3000)
    wait_for(lambda: len(list(tmp_path.glob("thoughts/*.mp4"))) > 3, process)
    stop(process, number)
    clips = len(list(tmp_path.glob("clips/*.mp4")))
    assert not hidden(tmp_path) and not list(tmp_path.glob("*.jsonl"))
    assert clips < 1500  # and those go on being good: they are not made again


def test_evaluation_over_an_endpoint_that_fails_and_one_that_is_slow(
    tmp_path: Path, reasoning_file: Path
) -> None:
    """Retries of a failing server are not begun any more; an answer that does not come is not waited for."""
    for script in (lambda _: 500, lambda _: time.sleep(20) or "A"):
        with serving(script) as (url, requests):
            process = start("evaluate", "m", reasoning_file, "--base-url", url, "--limit", 4)
            wait_for(lambda requests=requests: len(requests) >= 4, process)
            stop(process, signal.SIGINT)
            asked = len(requests)
            time.sleep(1)
            assert len(requests) == asked


def test_build_begins_no_paid_call(tmp_path: Path, reasoning_file: Path) -> None:
    rows = [
        row.model_copy(update={"plan": None, "thought_video": None, "keyframes": ()})
        for row in read_rows(reasoning_file)[:8]
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    slow = json.dumps({"selected": [0]})
    stopped = threading.Event()
    late = []

    def script(_: object) -> str:
        late.append(stopped.is_set())
        time.sleep(1)
        return slow

    with serving(script) as (url, requests):
        teacher = ("--model", "m", "--base-url", url, "--workers", 4)
        process = start(
            *("build", "--source", tmp_path / "rows.jsonl", "--out", tmp_path / "out"),
            *(*teacher, "generator=keyframes"),
        )
        wait_for(lambda: len(requests) >= 4, process)
        stopped.set()
        stop(process, signal.SIGINT)
        assert sum(late) <= 4  # one of each worker may have been on its way
    answers = list((tmp_path / "out" / "store" / "teacher").rglob("*.json"))
    assert len(answers) >= 4 and not hidden(tmp_path)  # what was paid is kept


def test_training(tmp_path: Path, backbone: str, reasoning_file: Path) -> None:
    process = start(
        *("train", "sft", f"model={backbone}", f"data={reasoning_file}", "training.report_to=none"),
        *(f"output_dir={tmp_path / 'run'}", "training.max_steps=2000", "training.save_steps=2"),
        *("training.per_device_train_batch_size=2", "training.save_strategy=steps"),
    )
    wait_for(lambda: bool(list(tmp_path.glob("run/checkpoint-*/complete.json"))), process)
    stop(process, signal.SIGINT)
    assert not hidden(tmp_path) and not (tmp_path / "run" / "versions.json").exists()


def test_a_pool_that_is_left_begins_nothing_and_waits_for_what_is_in_hand() -> None:
    begun, ended = [], []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.3)
        with suppress(Exception):
            proceed()
            begun.append("more")
        ended.append(number)

    with pytest.raises(KeyboardInterrupt), thread_pool(2) as pool:
        futures = [pool.submit(work, number) for number in range(9)]
        wait_for(lambda: len(begun) == 2)
        raise KeyboardInterrupt
    assert begun == [0, 1] and not ended
    assert isinstance(futures[0].exception(), Stopped) and futures[5].cancelled()


def test_a_pool_does_not_wait_for_ever() -> None:
    began, free = time.monotonic(), threading.Event()
    with pytest.raises(KeyboardInterrupt), thread_pool(1) as pool:
        pool.submit(free.wait)
        raise KeyboardInterrupt
    assert GRACE - 0.5 < time.monotonic() - began < GRACE + 2
    free.set()


def test_half_files_of_other_threads_go(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), in_one_step(tmp_path / "a") as unfinished:
        unfinished.touch()
        discard_half_files()
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def write_slowly(path: Path) -> None:
    with in_one_step(path) as unfinished:
        unfinished.touch()
        time.sleep(60)


def test_workers_leave_no_half_file(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker_pool(2) as pool:
        for number in range(4):
            pool.submit(write_slowly, tmp_path / f"{number}.json")
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < SECONDS
    assert not list(tmp_path.iterdir())


def block_within_c(path: Path) -> None:
    """Where no handler of Python's runs: as in the write of a result that nobody reads."""
    path.touch()
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


def test_a_crash_ends_workers_that_are_blocked(tmp_path: Path) -> None:
    with worker_pool(2) as pool:
        assert len(multiprocessing.active_children()) == 2  # none is begun while another crashes
        pool.submit(block_within_c, tmp_path / "blocked")
        wait_for((tmp_path / "blocked").exists)
        began = time.monotonic()
        with pytest.raises(BrokenProcessPool):
            pool.submit(os.abort).result()
    assert time.monotonic() - began < SECONDS


def test_few_items_wait_for_a_pool() -> None:
    items, squares = iter(range(5000)), {}
    with thread_pool(4) as pool:
        for item, square in completed(pool, lambda i: i * i, items):
            squares[item] = square
            if len(squares) == 1:
                assert next(items) == WAITING  # and is not worked on
    assert squares == {i: i * i for i in range(5000) if i != WAITING}
    with pytest.raises(ZeroDivisionError), thread_pool(2) as pool:
        list(completed(pool, lambda i: 1 // i, [1, 0]))
