"""The `latent` reasoner: STORM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import question_text
from storm_vlm.inference.frames import Frames, QuestionLike
from storm_vlm.inference.local_chat import model_settings
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.inference.reply import Reply


class Latent(Reasoner):
    """The pipeline as it is. Made directly, it takes a checkpoint without slots, too, which then just answers."""

    NEEDS_SLOTS: ClassVar[bool] = True

    def __init__(
        self,
        pipeline: StormPipeline,
        frames: Frames | None = None,
        max_new_tokens: int | None = None,
        **generate_kwargs: Any,
    ) -> None:
        pipeline.check_kwargs(generate_kwargs)
        super().__init__(frames or Frames(pipeline.collator.videos.num_frames), max_new_tokens)
        self.pipeline, self.generate_kwargs = pipeline, generate_kwargs

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "latent_mode": self.pipeline.latent_mode,
            "latent_budget": self.pipeline.collator.latent_budget,
            **model_settings(self.pipeline.model, self.pipeline.processor),
            **self.generate_kwargs,
        }

    def prompt(self, question: QuestionLike) -> str:
        return question_text(question.question, question.options)

    def answer(self, questions: Sequence[QuestionLike]) -> list[Reply]:
        began = time.perf_counter()
        clips = [self.frames.read(question) for question in questions]
        reading = time.perf_counter() - began
        clip_questions = [
            Question(clip, question.question, question.options)
            for question, clip in zip(questions, clips, strict=True)
        ]
        answers = self.pipeline.answer_batch(
            clip_questions, self.max_new_tokens, **self.generate_kwargs
        )
        replies = []
        for clip, answer in zip(clips, answers, strict=True):
            seconds = dict(answer.seconds)
            for phase in ("decode", "total"):
                seconds[phase] += reading
            replies.append(
                Reply(
                    answer.text,
                    tokens=answer.tokens,
                    frame_times=() if clip is None else tuple(clip.timestamps.tolist()),
                    prompt_tokens=answer.prompt_tokens,
                    visual_tokens=answer.visual_tokens,
                    slots_used=answer.slots_used,
                    forced_end=answer.forced_end,
                    opened=answer.opened,
                    seconds={phase: spent / len(questions) for phase, spent in seconds.items()},
                )
            )
        return replies
