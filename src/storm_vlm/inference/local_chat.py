"""Conversations with a model of transformers, in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from storm_vlm.data.check import check_length
from storm_vlm.data.collator import LAYOUT, expand_video
from storm_vlm.data.prompt import render_prompt
from storm_vlm.inference.chat import ChatModel, Completion, Turn
from storm_vlm.inference.pipeline import GREEDY, StormPipeline, count_written, prompt_sizes
from storm_vlm.inference.timing import Phases
from storm_vlm.model.backbones import input_device


class LocalChat:
    """Any video model of transformers with its processor, as `StormPipeline` loads it; no latent slots.

    A batch is asked at once; its time is divided evenly between its rows. `exact` makes every turn just
    as long as it may be, for measuring a model that does not know when to stop.
    """

    def __init__(self, pipeline: StormPipeline, exact: bool = False) -> None:
        self.model, self.processor, self.exact = pipeline.model, pipeline.processor, exact
        self.collator = pipeline.collator

    @property
    def settings(self) -> dict[str, Any]:
        return {"exact": self.exact, **model_settings(self.model, self.processor)}

    @torch.inference_mode()
    def write(self, chats: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[Completion]:
        began = time.perf_counter()
        inputs = self.inputs(chats)
        check_length(self.model.config, inputs["input_ids"].shape[1])
        ready = time.perf_counter()
        with Phases(self.model) as phases:
            output = self.model.generate(
                **inputs,
                **{
                    **GREEDY,
                    "max_new_tokens": max_new_tokens,
                    "min_new_tokens": max_new_tokens if self.exact else None,
                    "latent_mode": "off",
                },
            )
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        seconds = {"decode": ready - began, **phases.split(new_ids)}
        share = {phase: spent / len(chats) for phase, spent in seconds.items()}
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        counts = count_written(self.model, new_ids)
        sizes = zip(*prompt_sizes(self.processor, inputs), strict=True)
        return [
            Completion(text.strip(), tokens, *size, share)
            for text, tokens, size in zip(texts, counts, sizes, strict=True)
        ]

    def inputs(self, chats: Sequence[Sequence[Turn]]) -> dict[str, Any]:
        """What the stock processor makes of the conversations, padded on the left."""
        prompts, videos = [], []
        for chat in chats:
            prompt = render_prompt(self.processor, [_message(turn) for turn in chat], "off")
            clips = [turn.clip for turn in chat if turn.clip is not None]
            shown = [self.collator.videos.process(clip) for clip in clips]
            prompts.append(expand_video(self.processor, prompt, *(v[LAYOUT] for v in shown)))
            videos += shown
        device = input_device(self.model)
        inputs = self.collator.collate(prompts, videos)
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def chat_model(model: StormPipeline | ChatModel) -> ChatModel:
    """A pipeline as something to talk to; others are that already."""
    return LocalChat(model) if isinstance(model, StormPipeline) else model


def model_settings(model: Any, processor: Any) -> dict[str, Any]:
    """What of a model decides its answers: its type of numbers, the size of its frames, and how it writes."""
    video = processor.video_processor
    size = {name: edge for name, edge in dict(video.size).items() if edge is not None}
    cap = getattr(video, "cap_pixels_per_frame", None)
    return {
        "dtype": str(model.dtype),
        "pixels": {**size, "cap_pixels_per_frame": cap},
        "decoding": GREEDY,
    }


def _message(turn: Turn) -> dict[str, Any]:
    video = [] if turn.clip is None else [{"type": "video"}]
    return {"role": turn.role, "content": [*video, {"type": "text", "text": turn.text}]}
