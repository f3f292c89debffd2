"""The frames that a reasoner is shown: read as everywhere else, optionally ahead of it, or kept on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from storm_vlm.data.collator import Question, Reader
from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.video import Clip, VideoError, read_video
from storm_vlm.data.worker_pool import worker_pool

QuestionLike = Row | Question
Window = tuple[str, int, float | None, float | None]  # what a reader is called with


class FrameCache:
    """`read_video` that keeps what it reads in a folder: decoding an hour of video takes longer than answering."""

    def __init__(self, folder: str | Path) -> None:
        self._store = Store(folder)

    def __call__(self, path: str, num_frames: int, start: float | None, end: float | None) -> Clip:
        """Raises VideoError."""
        if not Path(path).is_file():
            return read_video(path, num_frames, start, end)  # which says what is wrong
        key = key_of(clip=self._store.content(path), window=[start, end], frames=num_frames)
        arrays = self._store.read("frames", key, load_file, ".safetensors")
        if arrays is None:
            clip = read_video(path, num_frames, start, end)
            arrays = {
                "frames": np.ascontiguousarray(clip.frames),
                "timestamps": clip.timestamps,
            }
            with self._store.place("frames", key, ".safetensors") as unfinished:
                save_file(arrays, unfinished)
        return Clip(arrays["frames"], arrays["timestamps"], path)


@dataclass(frozen=True)
class Frames:
    """Reads `num_frames` of a question's window; all reasoners of a comparison share one."""

    num_frames: int
    window: Reader = read_video  #: or a `FrameCache`
    _last: dict[Window, Clip] = field(default_factory=dict, compare=False, repr=False)
    _ahead: list[_ReadAhead] = field(default_factory=list, compare=False, repr=False)

    def read(self, question: QuestionLike) -> Clip | None:
        """None for a question without a video; the same clip again where the last question was about it, too.

        Raises VideoError.
        """
        if question.video is None or isinstance(question.video, Clip):
            return question.video
        asked = self._window(question)
        if asked not in self._last:
            ahead = next((ahead for ahead in self._ahead if asked in ahead.begun), None)
            clip = ahead.take(asked) if ahead else self.window(*asked)
            self._last.clear()
            self._last[asked] = clip
        return self._last[asked]

    @contextmanager
    def ahead(
        self, questions: Iterable[QuestionLike], processes: int, clips: int
    ) -> Iterator[None]:
        """Within, `processes` read so many clips of these questions before `read` asks for them, in this order.

        What else is asked for is read as ever. Where nothing is gained, there are no processes.
        """
        windows = deque(
            dict.fromkeys(self._window(q) for q in questions if isinstance(q.video, str))
        )
        if not processes or len(windows) <= clips:
            yield
            return
        with ExitStack() as pools:
            self._ahead.append(_ReadAhead(self.window, windows, pools, processes, clips))
            try:
                yield
            finally:
                self._ahead.clear()

    def _window(self, question: QuestionLike) -> Window:
        return str(question.video), self.num_frames, question.start, question.end


class _ReadAhead:
    """The first `count` of the windows that are left, read by processes, which a clip may crash."""

    def __init__(
        self, read: Reader, left: deque[Window], pools: ExitStack, processes: int, count: int
    ) -> None:
        self._read, self._left, self._pools = read, left, pools
        self._processes, self._count = processes, count
        self.begun: dict[Window, Future[Clip]] = {}
        self._begin_pool()
        self._begin_more()

    def _begin_pool(self) -> None:
        self._pool = self._pools.enter_context(worker_pool(self._processes))

    def _begin_more(self) -> None:
        with suppress(BrokenProcessPool):  # `take` will see it, too
            while self._left and len(self.begun) < self._count:
                self.begun[self._left[0]] = self._pool.submit(self._read, *self._left[0])
                self._left.popleft()

    def take(self, asked: Window) -> Clip:
        """One of those begun. Raises VideoError."""
        try:
            return self.begun.pop(asked).result()
        except BrokenProcessPool:  # this clip's fault, or another's
            self._left.extendleft(reversed(self.begun))
            self.begun.clear()
            self._begin_pool()
            return self._take_alone(asked)
        finally:
            self._begin_more()

    def _take_alone(self, asked: Window) -> Clip:
        try:
            return self._pool.submit(self._read, *asked).result()
        except BrokenProcessPool:
            self._begin_pool()
            raise VideoError(
                f"{asked[0]}: the decoder crashed; convert it to MP4 (H.264)"
            ) from None
