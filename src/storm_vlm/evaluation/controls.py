"""Controls: the same questions without what a model that watches the video, or reads the options, would need."""

from __future__ import annotations

import random
from typing import Literal, get_args

import numpy as np

from storm_vlm.data.collator import Question
from storm_vlm.data.row import Row
from storm_vlm.data.video import Clip
from storm_vlm.inference.frames import Asked, Frames

Control = Literal[
    "text_only", "one_frame", "shuffled_frames", "reversed_frames", "permuted_options"
]
CONTROLS: tuple[Control, ...] = get_args(Control)


def permute_options(row: Row) -> Row:
    """The same question with its options in another order, drawn by the row's id."""
    order = random.Random(row.id).sample(row.options, len(row.options))
    return row.model_copy(update={"options": tuple(order)})


def without_evidence(asked: Asked, control: Control, frames: Frames, seed: str) -> Asked:
    """The question without its video, with its last frame only, or with its frames in another order.

    The number of frames stays, and the times at which they are shown. Raises VideoError.
    """
    if control == "text_only":
        return Question(None, asked.question, asked.options)
    clip = frames.read(asked)
    if clip is None or control == "permuted_options":
        return asked
    count = len(clip.frames)
    order = {
        "one_frame": np.full(count, count - 1),
        "shuffled_frames": np.array(random.Random(seed).sample(range(count), count)),
        "reversed_frames": np.arange(count)[::-1],
    }[control]
    shown = Clip(clip.frames[order], clip.timestamps, clip.path)
    return Question(shown, asked.question, asked.options, asked.start, asked.end)
