"""Processes of one thread that work side by side, silently; they end with their parent, and at once with Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Barrier

from tqdm import tqdm

from storm_vlm.data.atomic_write import discard_half_files

PATIENCE = 1.0  # seconds for workers to end by themselves


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers end, and leave no half file, if its block is left by an exception."""
    context = multiprocessing.get_context("spawn")
    all_begun = context.Barrier(workers)
    arguments = (os.getpid(), all_begun)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=arguments)
    try:
        # Before there is work: a process that is begun while another crashes is waited for, but not ended.
        wait([pool.submit(os.getpid) for _ in range(workers)])
        yield pool
    except BaseException:
        children, until = multiprocessing.active_children(), time.monotonic() + PATIENCE
        for process in children:
            process.terminate()
        for process in children:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)  # it may wait for the rest of a result
        raise
    pool.shutdown(cancel_futures=True)


def _begin(parent: int, all_begun: Barrier) -> None:
    """In a worker, before it imports what it works with: this module must import nothing of that."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # bars of several runs would write over each other
    tqdm.set_lock(threading.RLock())  # its own would outlive a worker that is ended
    # A handler in Python waits for the main thread, which may be writing a result that nobody reads any more. And
    # what it raised would be taken for a job's result. So signals go to a thread.
    signals, wakeup = socket.socketpair()
    signals.settimeout(1)
    wakeup.setblocking(False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wakeup.fileno())
    threading.Thread(target=_end_with, args=(parent, signals, wakeup), daemon=True).start()
    all_begun.wait()


def _end_with(parent: int, signals: socket.socket, _wakeup: socket.socket) -> None:
    """End this process with a signal, or with its parent; both sockets live as long as the thread."""
    while os.getppid() == parent:
        with suppress(TimeoutError):
            signals.recv(1)
            break
    discard_half_files()
    os._exit(1)
