"""The keyframes as a slide show, two frames each (one temporal grid of Qwen2.5-VL)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from storm_vlm.construction.types import Generator, Imagined, Request
from storm_vlm.data.row import ThoughtSource


class Slides(Generator):
    source: ClassVar[ThoughtSource] = "keyframes"
    name = "keyframes"

    def settings(self) -> dict[str, Any]:
        return {"frames_each": 2, "fps": 4.0}

    def imagine(self, request: Request) -> Imagined:
        return Imagined(np.repeat(np.stack(request.keyframes), 2, axis=0), 4.0)
