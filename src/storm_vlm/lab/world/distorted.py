"""Thought videos that show the right steps badly: blurred, or at another speed than the model's slots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

from storm_vlm.data.row import Row
from storm_vlm.data.video import read_video, write_video
from storm_vlm.lab.world.clips import CRF, THOUGHT_STEPS, with_thought_video
from storm_vlm.lab.world.render import FPS, FRAMES_PER_STEP

Distortion = Literal["blurred", "fast", "slow", "uneven"]
DISTORTIONS: tuple[Distortion, ...] = get_args(Distortion)
FRAMES = THOUGHT_STEPS * FRAMES_PER_STEP
BLUR = 4  # pixels, of a cell's 32
COARSE = 40  # the codec's rate factor: less than half of the bytes


def distorted(frames: np.ndarray, how: Distortion, row_id: str) -> np.ndarray:
    """A thought video's frames uint8 (T, H, W, 3), so many as before.

    `blurred`: by a Gaussian. `fast`: all steps in the first half, and then it stands still. `slow`: the first half
    of the steps, and no others. `uneven`: at half to twice the speed, drawn for the row.
    """
    if how == "blurred":
        blur = ImageFilter.GaussianBlur(BLUR)
        return np.stack([np.asarray(Image.fromarray(frame).filter(blur)) for frame in frames])
    drawn = 2 ** random.Random(f"speed/{row_id}").uniform(-1, 1)
    speed = {"fast": 2.0, "slow": 0.5, "uneven": drawn}[how]
    shown = (np.arange(len(frames)) * speed).astype(int)
    return frames[shown.clip(max=len(frames) - 1)]


def with_distorted_thoughts(rows: Sequence[Row], folder: Path, how: Distortion) -> list[Row]:
    """Rows of `build_world` with other thought videos, which lie in the folder."""
    found = []
    folder.mkdir(exist_ok=True)
    for row in rows:
        if thought := row.thought_video:
            path = folder.absolute() / f"{how}-{Path(thought.path).name}"
            if not path.exists():
                frames = distorted(read_video(thought.path, FRAMES).frames, how, row.id)
                write_video(path, frames, FPS, crf=COARSE if how == "blurred" else CRF)
            row = with_thought_video(row, path, distorted=how)
        found.append(row)
    return found
