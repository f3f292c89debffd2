"""Threads that stop when they are told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
WAITING = 1024  # items that a pool is given at a time: more than it has threads, and far fewer than a data set's
GRACE = 3.0  # seconds that work in hand has to end, of the 5 that Ctrl-C may take
_thread = threading.local()


class Stopped(BaseException):
    """Work that nobody waits for any more. It is no Exception: nothing on its way may take it for one, and retry."""


@contextmanager
def thread_pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool whose block may be left by an exception: then nothing is begun, and work in hand has `GRACE` seconds.

    What still runs then is left behind: see `proceed`, and `cli.main`, which ends the process without it.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, initializer=_begin, initargs=(stop,))
    try:
        yield pool
    except BaseException:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        waiting = threading.Thread(target=pool.shutdown, daemon=True)
        waiting.start()
        waiting.join(GRACE)
        raise
    pool.shutdown()


def completed(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]
) -> Iterator[tuple[T, R]]:
    """Items and what `work` made of them, as they come, `WAITING` in hand at a time. Raises what `work` raises."""
    done: SimpleQueue[Future[R]] = SimpleQueue()
    waiting: dict[Future[R], T] = {}
    items = iter(items)
    while True:
        for item in islice(items, WAITING - len(waiting)):
            future = pool.submit(work, item)
            waiting[future] = item
            future.add_done_callback(done.put)
        if not waiting:
            return
        future = done.get()
        yield waiting.pop(future), future.result()


def proceed() -> None:
    """To be called before anything long, or paid, is begun: raises Stopped in a thread whose pool was left."""
    stop = getattr(_thread, "stop", None)
    if stop is not None and stop.is_set():
        raise Stopped


def _begin(stop: threading.Event) -> None:
    _thread.stop = stop
