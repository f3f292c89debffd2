"""Threads that stop when they are told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

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


def proceed() -> None:
    """To be called before anything long, or paid, is begun: raises Stopped in a thread whose pool was left."""
    stop = getattr(_thread, "stop", None)
    if stop is not None and stop.is_set():
        raise Stopped


def _begin(stop: threading.Event) -> None:
    _thread.stop = stop
