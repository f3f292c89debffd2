"""The real frames that follow the row's window: the ceiling for what a generator could imagine."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from storm_vlm.configs import Settings
from storm_vlm.construction.types import Generator, Imagined, Rejected, Request, pixels_hash
from storm_vlm.data.row import Row, ThoughtSource
from storm_vlm.data.video import VideoError, read_future


class FutureConfig(Settings):
    seconds: float = Field(4.0, gt=0, description="From the row's end on.")
    max_side: int = Field(512, ge=16, description="Pixels of the longer side.")
    frames: int = Field(16, ge=2)


class Future(Generator):
    Config = FutureConfig
    source: ClassVar[ThoughtSource] = "future"
    name = "future"

    def determined_by(self, request: Request) -> dict[str, Any]:
        # By content where there is some: a window that shows nothing has no key to be shared.
        frames, _ = self._frames(request.row)
        return {"frames": pixels_hash(frames)}

    def imagine(self, request: Request) -> Imagined:
        return Imagined(*self._frames(request.row))

    def _frames(self, row: Row) -> tuple[np.ndarray, float]:
        if row.end is None:
            raise Rejected("no_future", "the row's window has no end, so nothing follows it")
        config = self.config
        try:
            clip = read_future(row.video, config.frames, row.end, config.seconds, config.max_side)
        except VideoError as error:
            raise Rejected("no_future", str(error)) from error
        return clip.frames, clip.fps
