"""Where thought videos come from: a video model, the real future, the keyframes, or the micro world's simulator.

Another generator is a class with the same members, put into `GENERATORS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from storm_vlm.construction.config import BuildConfig
from storm_vlm.data.row import Row
from storm_vlm.data.video import VideoError, read_future

Source = Literal["oracle", "generated", "future", "keyframes"]


class Rejected(Exception):
    """A row that cannot be used, now or later: ``reason`` is one word, ``detail`` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Request:
    """What a thought video is to be made from: the row, its keyframes (H, W, 3) uint8, the text (or "")."""

    row: Row
    keyframes: tuple[np.ndarray, ...]
    prompt: str


@dataclass(frozen=True)
class Imagined:
    """Frames (T, H, W, 3) uint8 at `fps`, and what making them took, which is kept beside them."""

    frames: np.ndarray
    fps: float
    costs: dict[str, float]


class Generator(Protocol):
    """Called from several threads; one that cannot be must lock."""

    source: ClassVar[Source]
    needs_prompt: ClassVar[bool]
    name: str

    def settings(self) -> dict[str, Any]:
        """What, besides the request and the seed, decides the result; kept as provenance."""
        ...

    def determined_by(self, request: Request) -> dict[str, Any]:
        """What of the request decides the result, as JSON: part of the key that a finished video is found by."""
        ...

    def imagine(self, request: Request) -> Imagined:
        """Raises :class:`Rejected` if the row has no such video."""
        ...


def pixels_hash(frame: np.ndarray) -> str:
    """SHA-256 of the pixels and their shape."""
    return hashlib.sha256(str(frame.shape).encode() + frame.tobytes()).hexdigest()


class Future:
    """The real frames that follow the row's window: the ceiling for what a generator could imagine."""

    source: ClassVar[Source] = "future"
    needs_prompt: ClassVar[bool] = False
    name = "future"
    FRAMES = 16

    def __init__(self, config: BuildConfig) -> None:
        self.seconds, self.max_side = config.future_seconds, config.max_side

    def settings(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "max_side": self.max_side, "frames": self.FRAMES}

    def determined_by(self, request: Request) -> dict[str, Any]:
        # By content where there is some: a window that shows nothing has no key to be shared.
        frames, _ = self._frames(request.row)
        return {"frames": pixels_hash(frames)}

    def imagine(self, request: Request) -> Imagined:
        return Imagined(*self._frames(request.row), costs={})

    def _frames(self, row: Row) -> tuple[np.ndarray, float]:
        if row.end is None:
            raise Rejected("no_future", "the row's window has no end, so nothing follows it")
        try:
            clip = read_future(row.video, self.FRAMES, row.end, self.seconds, self.max_side)
        except VideoError as error:
            raise Rejected("no_future", str(error)) from error
        return clip.frames, clip.fps


class Slides:
    """The keyframes as a slide show, two frames each (one temporal grid of Qwen2.5-VL)."""

    source: ClassVar[Source] = "keyframes"
    needs_prompt: ClassVar[bool] = False
    name = "keyframes"

    def __init__(self, config: BuildConfig) -> None:
        pass

    def settings(self) -> dict[str, Any]:
        return {"frames_each": 2, "fps": 4.0}

    def determined_by(self, request: Request) -> dict[str, Any]:
        return {"keyframes": [pixels_hash(frame) for frame in request.keyframes]}

    def imagine(self, request: Request) -> Imagined:
        return Imagined(np.repeat(np.stack(request.keyframes), 2, axis=0), 4.0, costs={})


class World:
    """The micro world's oracle: the scene is drawn again from the row's id and simulated on."""

    source: ClassVar[Source] = "oracle"
    needs_prompt: ClassVar[bool] = False
    name = "storm_vlm.lab.world"

    def __init__(self, config: BuildConfig) -> None:
        pass

    def settings(self) -> dict[str, Any]:
        return {}

    def determined_by(self, request: Request) -> dict[str, Any]:
        return {"id": request.row.id, "scenes": request.row.meta.get("scenes")}

    def imagine(self, request: Request) -> Imagined:
        from storm_vlm.lab.world.clips import THOUGHT_STEPS
        from storm_vlm.lab.world.render import FPS, thought_frames

        row = request.row
        try:
            kind, split, seed, index, _ = row.id.split("-")
            scenes = _scenes(kind, split, int(row.meta["scenes"]), int(seed))
            scene, (question,) = scenes[int(index)]
        except (KeyError, ValueError, IndexError) as error:
            raise Rejected("no_scene", f"{row.id!r} is no reasoning row of storm world") from error
        if (question.text, question.answer) != (row.question, row.answer):
            raise Rejected("no_scene", f"{row.id!r} is of another version of the micro world")
        frames = thought_frames(scene, question.steps, THOUGHT_STEPS, question.ball)
        return Imagined(frames, FPS, costs={})


@cache
def _scenes(kind: Any, split: Any, count: int, seed: int) -> list[Any]:
    from storm_vlm.lab.world.clips import draw_scenes

    return list(draw_scenes(kind, split, count, seed))


def _wan(config: BuildConfig) -> Generator:
    from storm_vlm.construction.wan import Wan

    return Wan(config)


GENERATORS: dict[str, Callable[[BuildConfig], Generator]] = {
    "wan": _wan,
    "future": Future,
    "keyframes": Slides,
    "world": World,
}
