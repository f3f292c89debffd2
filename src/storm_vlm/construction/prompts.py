"""What the teacher is asked, and what it may answer (paper appendix B, in our words)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from storm_vlm.data.jpeg import jpeg_uri
from storm_vlm.data.prompt import option_letter
from storm_vlm.data.row import Row

Messages = list[dict[str, Any]]
WORDS = (50, 140)  # accepted of a video prompt; 80 to 100 are asked for

_KEYFRAMES = """You prepare training data for a video model. You get a question about a video and candidate frames, \
each with its index and time. Choose the frames that show the evidence for the answer: where what matters is first \
seen, changes, or ends. Choose at least 1 and at most {most}, fewer if fewer say it all. Answer with JSON only: \
{{"selected": [indices]}}."""

_PLAN = """You prepare training data for a video model. You get a question about a video and its key frames in \
order. Write how one gets from what the frames show to the answer: what is where, what moves or changes, in which \
order, and what follows. Name only what can be seen or follows from it. At most 150 words. Answer with JSON only: \
{"plan": "text"}."""

_PROMPT = """You write prompts for a model that animates a picture. You get the picture, a question about the video \
that it comes from, and a plan of reasoning. Describe in one paragraph, in the present tense and in 80 to 100 words, \
what the animation shows from this picture on, so that the plan can be seen to happen: the subject, its motions in \
order, what changes its state, and the camera, which stays still unless the plan needs otherwise. Visible things \
only: no reasoning, no mention of a question, of options or their letters, no text in the picture. Answer with JSON \
only: {"prompt": "text"}."""

_LETTERS = re.compile(
    r"(?i:\b(?:option|choice|answer)\s+(?:is\s+)?)\(?[A-Z]\b|\([A-Z]\)|(?:^|\s)[A-Z][.)]\s"
)


class Keyframes(BaseModel):
    """Indices of the chosen candidates, ascending. Context: `candidates`, how many there are; `most`, K."""

    model_config = ConfigDict(extra="forbid")
    selected: list[int]

    @model_validator(mode="after")
    def _usable(self, info: ValidationInfo) -> Self:
        limits = info.context or {}
        count, most = limits["candidates"], limits["most"]
        if not 1 <= len(self.selected) <= most:
            raise ValueError(f"select 1 to {most} frames, not {len(self.selected)}")
        if len(set(self.selected)) < len(self.selected):
            raise ValueError("select each frame once")
        if outside := [i for i in self.selected if not 0 <= i < count]:
            raise ValueError(f"indices go from 0 to {count - 1}; there is no {outside}")
        self.selected.sort()
        return self


class ReasoningPlan(BaseModel):
    """The teacher's reasoning in words."""

    model_config = ConfigDict(extra="forbid", title="Plan")  # as in the keys of stored answers
    plan: str

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if not 5 <= len(self.plan.split()) <= 400:
            raise ValueError(f"the plan has {len(self.plan.split())} words; write 5 to 150")
        return self


class VideoPrompt(BaseModel):
    """What the video generator is told."""

    model_config = ConfigDict(extra="forbid")
    prompt: str

    @model_validator(mode="after")
    def _usable(self) -> Self:
        words = len(self.prompt.split())
        if not WORDS[0] <= words <= WORDS[1]:
            raise ValueError(f"the prompt has {words} words; write 80 to 100")
        if "\n" in self.prompt.strip():
            raise ValueError("write one paragraph")
        if found := _LETTERS.search(self.prompt):
            raise ValueError(f"do not mention options or letters: {found[0].strip()!r}")
        return self


def keyframe_messages(
    row: Row,
    frames: Sequence[np.ndarray],
    times: Sequence[float],
    most: int,
    show_answer: bool,
    detail: str,
) -> Messages:
    """Candidates as JPEG, each after its index and time."""
    return _messages(
        _KEYFRAMES.format(most=most), _question(row, show_answer), frames, times, detail
    )


def plan_messages(
    row: Row, frames: Sequence[np.ndarray], times: Sequence[float], show_answer: bool, detail: str
) -> Messages:
    return _messages(_PLAN, _question(row, show_answer), frames, times, detail)


def video_messages(row: Row, frame: np.ndarray, time: float, detail: str) -> Messages:
    """The first keyframe, the question without options, the plan."""
    text = f"Question: {row.question}\nPlan: {row.plan}"
    return _messages(_PROMPT, text, [frame], [time], detail)


def repair_message(error: str) -> dict[str, Any]:
    """Tells the teacher what was wrong with its last answer."""
    return {"role": "user", "content": f"That cannot be used: {error}. Answer again, JSON only."}


def _question(row: Row, show_answer: bool) -> str:
    lines = [f"Question: {row.question}"]
    lines += [f"{option_letter(i)}. {option}" for i, option in enumerate(row.options)]
    if show_answer:
        lines.append(f"Correct answer: {row.answer}")
    return "\n".join(lines)


def _messages(
    system: str, text: str, frames: Sequence[np.ndarray], times: Sequence[float], detail: str
) -> Messages:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for index, (frame, time) in enumerate(zip(frames, times, strict=True)):
        content.append({"type": "text", "text": f"frame {index}, t = {time:.2f} s"})
        picture = {"url": jpeg_uri(frame), "detail": detail}
        content.append({"type": "image_url", "image_url": picture})
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]
