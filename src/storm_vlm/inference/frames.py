"""The frames that a reasoner is shown: read as everywhere else, and optionally kept on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.collator import Question
from storm_vlm.data.row import Row
from storm_vlm.data.video import Clip, read_video

Asked = Row | Question


@dataclass(frozen=True)
class Frames:
    """Reads `num_frames` of a question's window; all reasoners of a comparison share one."""

    num_frames: int
    cache: Path | None = None  #: folder; decoding an hour of video takes longer than answering

    def read(self, asked: Asked) -> Clip | None:
        """None for a question without a video. Raises VideoError."""
        if asked.video is None or isinstance(asked.video, Clip):
            return asked.video
        return self.window(asked.video, self.num_frames, asked.start, asked.end)

    def window(self, path: str, count: int, start: float | None, end: float | None) -> Clip:
        """As `read_video`, from the cache if the same file was read so before. Raises VideoError."""
        file = self.cache and self._file(self.cache, path, count, start, end)
        if file is None:
            return read_video(path, count, start, end)
        if not file.exists():
            clip = read_video(path, count, start, end)
            with in_one_step(file) as unfinished:
                np.savez(unfinished, frames=clip.frames, timestamps=clip.timestamps)
        with np.load(file) as kept:
            return Clip(kept["frames"], kept["timestamps"], path)

    @staticmethod
    def _file(folder: Path, path: str, *window: float | None) -> Path | None:
        """Where these frames are kept, by the file's size and date; None for a file that is not there."""
        if not Path(path).is_file():
            return None
        known = Path(path).stat()
        key = repr((str(Path(path).absolute()), known.st_size, known.st_mtime_ns, window))
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
