"""From names and options to a reasoner; for the command line and for lmms-eval."""

from __future__ import annotations

from typing import Any

from storm_vlm.evaluation.run_folder import RunError
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.local_chat import ChatModel, LocalChat
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import (
    MAX_NEW_TOKENS,
    REASONERS,
    Latent,
    OneTurn,
    Reasoner,
    ReasonerName,
)
from storm_vlm.inference.remote_chat import EndpointChat
from storm_vlm.inference.tools import Tools


def load_pipeline(
    checkpoint: str,
    device: str,
    num_frames: int | None = None,
    max_pixels: int | None = None,
    **kwargs: Any,
) -> StormPipeline:
    """`StormPipeline.from_pretrained`, with frames of at most `max_pixels` (None: as its processor says).

    Raises RunError where that processor knows no such bound.
    """
    pipeline = StormPipeline.from_pretrained(
        checkpoint, device=device, num_frames=num_frames, **kwargs
    )
    if max_pixels is not None:
        video = pipeline.processor.video_processor
        if video.size["shortest_edge"] is None:
            raise RunError(f"{type(video).__name__} scales to a fixed size: leave max_pixels out")
        least = min(video.size["shortest_edge"], max_pixels)
        video.size = {"shortest_edge": least, "longest_edge": max_pixels}
    return pipeline


def default_reasoner(pipeline: StormPipeline | None) -> ReasonerName:
    """`latent` for a checkpoint with slots, else `direct`."""
    return "direct" if pipeline is None or pipeline.latent_mode == "off" else "latent"


def build_reasoner(
    name: ReasonerName,
    model: StormPipeline | EndpointChat,
    frames: Frames,
    max_new_tokens: int | None = None,
) -> Reasoner:
    """The reasoner of that name. Raises RunError: an unknown one, or `latent` without slots."""
    if name not in REASONERS:
        raise RunError(f"no reasoner is called {name!r}: choose from {', '.join(REASONERS)}")
    bound = max_new_tokens or MAX_NEW_TOKENS[name]
    if name == "latent":
        if not isinstance(model, StormPipeline) or model.latent_mode == "off":
            raise RunError("the latent reasoner needs a checkpoint that has slots (storm train)")
        return Latent(model, frames, bound)
    chat: ChatModel = LocalChat(model) if isinstance(model, StormPipeline) else model
    return Tools(chat, frames, bound) if name == "tools" else OneTurn(chat, frames, name, bound)
