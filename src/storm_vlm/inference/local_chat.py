"""A model one can talk to about frames: one of transformers here, one behind an endpoint in `endpoint.py`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from storm_vlm.data.prompt import render_prompt
from storm_vlm.data.video import Clip, video_metadata
from storm_vlm.errors import StormError
from storm_vlm.inference.pipeline import StormPipeline, count_written, prompt_sizes
from storm_vlm.inference.timing import Phases


@dataclass(frozen=True)
class Turn:
    """A message of a conversation; `clip`: frames that are shown before its text."""

    role: Literal["user", "assistant"]
    text: str
    clip: Clip | None = None
    starts_at: float = 0.0  #: seconds of the file that count as 0 in the conversation


@dataclass(frozen=True)
class Written:
    """A model's turn, and what it took."""

    text: str
    tokens: int
    prompt_tokens: int
    visual_tokens: int  #: 0 where an endpoint does not tell
    seconds: Mapping[str, float]  #: by phase, see `Reply`


class RefusedError(StormError, ValueError):
    """A model would not take this conversation, though it takes others (an endpoint's status 400)."""


class ChatModel(Protocol):
    """What a reasoner needs of a model."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its answers, for the record."""
        ...

    def write(self, chats: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[Written]:
        """The next turn of each conversation, greedily. Raises `RefusedError`, `OSError`."""
        ...


class LocalChat:
    """Any video model of transformers with its processor, as `StormPipeline` loads it; no latent slots.

    A batch is asked at once; its time is divided evenly between its rows. `exact` makes every turn just
    as long as it may be, for measuring a model that does not know when to stop.
    """

    def __init__(self, pipeline: StormPipeline, exact: bool = False) -> None:
        self.model, self.processor, self.exact = pipeline.model, pipeline.processor, exact

    @property
    def settings(self) -> dict[str, Any]:
        return {"exact": self.exact, **loaded(self.model, self.processor)}

    @torch.inference_mode()
    def write(self, chats: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[Written]:
        began = time.perf_counter()
        inputs = self.inputs(chats)
        ready = time.perf_counter()
        with Phases(self.model) as phases:
            output = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens if self.exact else None,
                latent_mode="off",
            )
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        seconds = {"decode": ready - began, **phases.split(new_ids)}
        share = {phase: spent / len(chats) for phase, spent in seconds.items()}
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        counts = count_written(self.model, new_ids)
        prompts, visual = prompt_sizes(self.processor, inputs)
        return [
            Written(text.strip(), tokens, of_prompt, seen, share)
            for text, tokens, of_prompt, seen in zip(texts, counts, prompts, visual, strict=True)
        ]

    def inputs(self, chats: Sequence[Sequence[Turn]]) -> dict[str, Any]:
        """What the stock processor makes of the conversations, padded on the left."""
        prompts = [
            render_prompt(self.processor, [_message(turn) for turn in chat], "off")
            for chat in chats
        ]
        clips = [turn.clip for chat in chats for turn in chat if turn.clip is not None]
        videos: dict[str, Any] = {}
        if clips:
            videos["videos"] = [clip.frames for clip in clips]
            videos["video_metadata"] = [video_metadata(clip) for clip in clips]
            videos["do_sample_frames"] = False
        inputs = self.processor(
            text=prompts, padding=True, padding_side="left", return_tensors="pt", **videos
        )
        return {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }


def _message(turn: Turn) -> dict[str, Any]:
    video = [] if turn.clip is None else [{"type": "video"}]
    return {"role": turn.role, "content": [*video, {"type": "text", "text": turn.text}]}


def loaded(model: Any, processor: Any) -> dict[str, Any]:
    """What of a loaded model decides its answers: its type of numbers, and the size that frames are scaled to."""
    video = processor.video_processor
    size = {name: edge for name, edge in dict(video.size).items() if edge is not None}
    cap = getattr(video, "cap_pixels_per_frame", None)
    return {"dtype": str(model.dtype), "pixels": {**size, "cap_pixels_per_frame": cap}}
