"""What a generator of thought videos takes and gives."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from storm_vlm.configs import Settings
from storm_vlm.data.row import Row, ThoughtSource


class Rejected(Exception):
    """A row that cannot be used: ``reason`` is one word, ``detail`` says more.

    ``final``: nor will it be, as long as row and config stay; the next run does not try again.
    """

    def __init__(self, reason: str, detail: str, final: bool = True) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.final = reason, detail, final


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
    costs: dict[str, float] = field(default_factory=dict)


class Generator(ABC):
    """Makes thought videos. Called from several threads; one that cannot be must lock.

    ``Config`` holds its settings: `generator_config` of a run, with its help, defaults and checks.
    """

    Config: ClassVar[type[Settings]] = Settings
    name: str  #: as rows and keys of finished videos have it
    source: ClassVar[ThoughtSource] = "generated"
    needs_prompt: ClassVar[bool] = False
    on_gpu: bool = False  #: wants a GPU of its own on a cluster

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self.seed = config, seed

    def settings(self) -> dict[str, Any]:
        """What, besides the request and the seed, decides the result; kept as provenance."""
        return self.config.model_dump()

    def determined_by(self, request: Request) -> dict[str, Any]:
        """What of the request decides the result, as JSON: part of the key that a finished video is found by."""
        frames = [pixels_hash(frame) for frame in request.keyframes]
        return {"keyframes": frames} | ({"prompt": request.prompt} if self.needs_prompt else {})

    @abstractmethod
    def imagine(self, request: Request) -> Imagined:
        """Raises :class:`Rejected` if the row has no such video."""


def pixels_hash(frame: np.ndarray) -> str:
    """SHA-256 of the pixels and their shape."""
    return hashlib.sha256(str(frame.shape).encode() + frame.tobytes()).hexdigest()
