"""The frames that a reasoner is shown: read as everywhere else, and optionally kept on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from storm_vlm.data.collator import Question, Reader
from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.video import Clip, read_video

QuestionLike = Row | Question


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
    _last: dict[tuple[Any, ...], Clip] = field(default_factory=dict, compare=False, repr=False)

    def read(self, question: QuestionLike) -> Clip | None:
        """None for a question without a video; the same clip again where the last question was about it, too.

        Raises VideoError.
        """
        if question.video is None or isinstance(question.video, Clip):
            return question.video
        asked = (question.video, self.num_frames, question.start, question.end)
        if asked not in self._last:
            clip = self.window(*asked)
            self._last.clear()
            self._last[asked] = clip
        return self._last[asked]
