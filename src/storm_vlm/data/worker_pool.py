"""Processes of one thread that work side by side, silently; they end with their parent, and at once with Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from tqdm import tqdm

from storm_vlm.data.atomic_write import discard_half_files

PATIENCE = 1.0  # seconds for workers to end by themselves


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers end, and leave no half file, if its block is left by an exception."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        children, until = multiprocessing.active_children(), time.monotonic() + PATIENCE
        for process in children:
            process.terminate()
        for process in children:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """In a worker, before it imports what it works with: this module must import nothing of that."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # bars of several runs would write over each other
    tqdm.set_lock(threading.RLock())  # its own would outlive a worker that is ended
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)  # an exception would be taken for a job's result
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    _end()


def _end(*_: object) -> None:
    discard_half_files()
    os._exit(1)
