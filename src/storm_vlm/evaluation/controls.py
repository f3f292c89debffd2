"""Controls: the same questions without what a model that watches the video, or reads the options, would need."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from storm_vlm.registry import Registry

if TYPE_CHECKING:
    from storm_vlm.data.row import Row
    from storm_vlm.data.video import Clip
    from storm_vlm.inference.frames import Frames, QuestionLike


class Control:
    """Changes the row, before it is posed and scored, or the question that is posed. Made without arguments."""

    SHOWS_VIDEO: ClassVar[bool] = True
    PERMUTES_OPTIONS: ClassVar[bool] = False  #: needs rows with options, in our own prompt

    def row(self, row: Row) -> Row:
        """The row as it is scored."""
        return row

    def question(self, question: QuestionLike, frames: Frames, seed: str) -> QuestionLike:
        """The question as it is put. Raises VideoError."""
        return question


CONTROLS: Registry[type[Control]] = Registry("controls")


@CONTROLS.register("text_only")
class TextOnly(Control):
    """Without the video."""

    SHOWS_VIDEO: ClassVar[bool] = False

    def question(self, question: QuestionLike, frames: Frames, seed: str) -> QuestionLike:
        return _about(question, None)


class _FrameOrder(Control, ABC):
    """Other frames at the same times; their number stays."""

    def question(self, question: QuestionLike, frames: Frames, seed: str) -> QuestionLike:
        clip = frames.read(question)
        if clip is None:
            return question
        order = self.order(len(clip.frames), seed)
        return _about(question, dataclasses.replace(clip, frames=clip.frames[order]))

    @abstractmethod
    def order(self, count: int, seed: str) -> np.ndarray:
        """The index of the frame that is shown at each of `count` times."""


@CONTROLS.register("one_frame")
class OneFrame(_FrameOrder):
    """The last one all the time."""

    def order(self, count: int, seed: str) -> np.ndarray:
        return np.full(count, count - 1)


@CONTROLS.register("shuffled_frames")
class ShuffledFrames(_FrameOrder):
    """In an order drawn by the seed, the row's id."""

    def order(self, count: int, seed: str) -> np.ndarray:
        return np.array(random.Random(seed).sample(range(count), count))


@CONTROLS.register("reversed_frames")
class ReversedFrames(_FrameOrder):
    """The last one first."""

    def order(self, count: int, seed: str) -> np.ndarray:
        return np.arange(count)[::-1]


@CONTROLS.register("permuted_options")
class PermutedOptions(Control):
    """The options in another order, drawn by the row's id."""

    PERMUTES_OPTIONS = True

    def row(self, row: Row) -> Row:
        order = random.Random(row.id).sample(row.options, len(row.options))
        return row.model_copy(update={"options": tuple(order)})


def _about(question: QuestionLike, clip: Clip | None) -> QuestionLike:
    from storm_vlm.data.collator import Question  # needs torch, which the controls' names do not

    return Question(clip, question.question, question.options, question.start, question.end)
