"""Five ways to reason about a video on one backbone, with one reader, one scorer and one clock.

`direct` writes the answer; `cot` a chain of thought before it (Video-R1's protocol); `grounded_cot` a chain
of captions with their times (Video-Thinker's); `tools` may look at parts of the video again (LongVT's);
`latent` is STORM. The first four run on any `ChatModel`. Tags are the protocols' own, the words are ours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import question_text
from storm_vlm.inference.frames import Asked, Frames
from storm_vlm.inference.local_chat import ChatModel, Turn, Written, loaded
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reply import Reply

ReasonerName = Literal["latent", "direct", "cot", "grounded_cot", "tools"]
REASONERS: tuple[ReasonerName, ...] = get_args(ReasonerName)

_FINALLY = "give only the answer{letter} between <answer> and </answer>."
PROTOCOLS = {
    "cot": "First think it through between <think> and </think>. Then " + _FINALLY,
    "grounded_cot": (
        "Go through the parts of the video that matter, in order. For each, write when it is as "
        "<time>start-end</time> in seconds, what is seen then as <caption>...</caption>, and what follows from it "
        "as <think>...</think>. Then " + _FINALLY
    ),
}
#: tokens that a turn may take where the caller sets no bound
MAX_NEW_TOKENS: dict[ReasonerName, int] = {
    "latent": 32,
    "direct": 32,
    "cot": 1024,
    "grounded_cot": 2048,
    "tools": 1024,
}


class Reasoner(Protocol):
    """Answers questions about videos."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its answers, for the record."""
        ...

    def prompt(self, asked: Asked) -> str:
        """The text that a question is put with."""
        ...

    def answer(self, rows: Sequence[Asked]) -> list[Reply]:
        """One reply each, in order. Raises VideoError, RefusedError, OSError."""
        ...


class Latent:
    """STORM: the pipeline as it is. Also answers with a checkpoint without slots, directly."""

    def __init__(
        self,
        pipeline: StormPipeline,
        frames: Frames | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS["latent"],
        **generate_kwargs: Any,
    ) -> None:
        self.pipeline, self.max_new_tokens = pipeline, max_new_tokens
        self.frames = frames or Frames(pipeline.collator.videos.num_frames)
        self.generate_kwargs = generate_kwargs

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "latent_mode": self.pipeline.latent_mode,
            "latent_budget": self.pipeline.collator.latent_budget,
            **loaded(self.pipeline.model, self.pipeline.processor),
            **self.generate_kwargs,
        }

    def prompt(self, asked: Asked) -> str:
        return question_text(asked.question, asked.options)

    def answer(self, rows: Sequence[Asked]) -> list[Reply]:
        began = time.perf_counter()
        clips = [self.frames.read(row) for row in rows]
        read = time.perf_counter() - began
        questions = [
            Question(clip, row.question, row.options) for row, clip in zip(rows, clips, strict=True)
        ]
        answers = self.pipeline.answer_batch(questions, self.max_new_tokens, **self.generate_kwargs)
        replies = []
        for clip, found in zip(clips, answers, strict=True):
            seconds = added(found.seconds, {"decode": read, "total": read})
            replies.append(
                Reply(
                    found.text,
                    tokens=found.tokens,
                    frame_times=() if clip is None else tuple(clip.timestamps.tolist()),
                    prompt_tokens=found.prompt_tokens,
                    visual_tokens=found.visual_tokens,
                    slots_used=found.slots_used,
                    forced_end=found.forced_end,
                    opened=found.opened,
                    seconds={phase: spent / len(rows) for phase, spent in seconds.items()},
                )
            )
        return replies


class OneTurn:
    """`direct`, `cot` and `grounded_cot`: one question, one turn. A chain that is cut off has no answer."""

    def __init__(
        self,
        chat: ChatModel,
        frames: Frames,
        protocol: Literal["direct", "cot", "grounded_cot"],
        max_new_tokens: int | None = None,
    ) -> None:
        self.chat, self.frames, self.protocol = chat, frames, protocol
        self.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS[protocol]

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, **self.chat.settings}

    def prompt(self, asked: Asked) -> str:
        return question_text(asked.question, asked.options, instruction(self.protocol, asked))

    def answer(self, rows: Sequence[Asked]) -> list[Reply]:
        talks = [Talk(row, self.prompt(row), self.frames) for row in rows]
        written = self.chat.write([talk.turns for talk in talks], self.max_new_tokens)
        for talk, turn in zip(talks, written, strict=True):
            talk.hear(turn)
        return [talk.reply() for talk in talks]


class Talk:
    """One question's conversation, and what it has taken so far."""

    def __init__(self, asked: Asked, text: str, frames: Frames) -> None:
        began = time.perf_counter()
        clip = frames.read(asked)
        self.seconds = {"decode": time.perf_counter() - began}
        self.asked = asked
        self.turns = [Turn("user", text, clip, asked.start or 0.0)]
        self.heard: list[Written] = []

    def hear(self, written: Written) -> None:
        """Take in the model's turn."""
        self.heard.append(written)
        self.seconds = added(self.seconds, written.seconds)

    def reply(self) -> Reply:
        """Its outcome: the last turn is the answer."""
        last = self.heard[-1]
        clips = [turn.clip for turn in self.turns if turn.clip is not None]
        return Reply(
            last.text,
            transcript=tuple(turn.text for turn in self.turns[1:]),
            tokens=sum(written.tokens for written in self.heard),
            rounds=len(self.heard),
            frame_times=tuple(time for clip in clips for time in clip.timestamps.tolist()),
            prompt_tokens=last.prompt_tokens,
            visual_tokens=last.visual_tokens,
            seconds={**self.seconds, "total": sum(self.seconds.values())},
        )


def instruction(protocol: str, asked: Asked) -> str | None:
    """How to answer; None leaves it to `question_text`."""
    if protocol == "direct":
        return None
    letter = ", as the option's letter," if asked.options else ""
    return PROTOCOLS[protocol].format(letter=letter)


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase of two together."""
    return {phase: one.get(phase, 0.0) + other.get(phase, 0.0) for phase in {**one, **other}}
