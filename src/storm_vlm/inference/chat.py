"""Conversations about frames, with a model here (`local_chat.py`) or behind an endpoint (`remote_chat.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from storm_vlm.data.video import Clip
from storm_vlm.inference.client import Fault
from storm_vlm.inference.frames import Frames, QuestionLike
from storm_vlm.inference.reply import Reply


@dataclass(frozen=True)
class Turn:
    """A message of a conversation; `clip`: frames that are shown before its text."""

    role: Literal["user", "assistant"]
    text: str
    clip: Clip | None = None
    starts_at: float = 0.0  #: seconds of the file that count as 0 in the conversation


@dataclass(frozen=True)
class Completion:
    """A model's turn, and what it took."""

    text: str
    tokens: int
    prompt_tokens: int
    visual_tokens: int  #: 0 where an endpoint does not tell
    seconds: Mapping[str, float]  #: by phase, see `Reply`
    fault: Fault = ""  #: see `Reply`


class ChatModel(Protocol):
    """What a reasoner needs of a model."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its answers, for the record."""
        ...

    def write(self, chats: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[Completion]:
        """The next turn of each conversation, greedily. Raises `RefusedError`, `EndpointError`."""
        ...


class Conversation:
    """One question's turns, and what they have taken so far."""

    def __init__(
        self,
        question: QuestionLike,
        frames: Frames,
        prompt: Callable[[QuestionLike, Clip | None], str],
    ) -> None:
        began = time.perf_counter()
        clip = frames.read(question)
        self.seconds = {"decode": time.perf_counter() - began}
        self.question = question
        self.turns = [Turn("user", prompt(question, clip), clip, question.start or 0.0)]
        self.completions: list[Completion] = []

    def add(self, completion: Completion) -> None:
        """The model's turn; `turns` stays as it is."""
        self.completions.append(completion)
        self.spend(completion.seconds)

    def spend(self, seconds: Mapping[str, float]) -> None:
        """Add seconds, by phase."""
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def reply(self) -> Reply:
        """The outcome: the model's last turn is the answer."""
        last = self.completions[-1]
        clips = [turn.clip for turn in self.turns if turn.clip is not None]
        return Reply(
            last.text,
            transcript=tuple(turn.text for turn in self.turns[1:]),
            tokens=sum(completion.tokens for completion in self.completions),
            rounds=len(self.completions),
            frame_times=tuple(time for clip in clips for time in clip.timestamps.tolist()),
            prompt_tokens=last.prompt_tokens,
            visual_tokens=last.visual_tokens,
            seconds={**self.seconds, "total": sum(self.seconds.values())},
            fault=last.fault,
        )
