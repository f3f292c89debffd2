"""A checkpoint's processor: whether it belongs to the model, and what bounds the size of a frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from storm_vlm.data.prompt import build_messages, render_prompt
from storm_vlm.data.video import Clip, video_metadata
from storm_vlm.errors import InputError, StormError
from storm_vlm.model.checkpoint import CheckpointError, loading


def check_processor(processor: Any, config: Any) -> None:
    """Raises CheckpointError for a processor that cannot put a question about a clip to a model of this config."""
    name, frames = config.name_or_path or "this model", np.zeros((4, 56, 56, 3), np.uint8)
    clip = Clip(frames, np.arange(4.0), "a blank clip")
    with loading(name, "the processor or chat template of "):
        prompt = render_prompt(processor, build_messages("Where?"), "off")
        processor(
            text=[prompt],
            videos=[frames],
            video_metadata=[video_metadata(clip)],
            do_sample_frames=False,
            return_tensors="pt",
        )
    if "Where?" not in prompt or processor.video_token not in prompt:
        raise CheckpointError(
            f"the chat template of {name} leaves out the question or the video: copy chat_template.jinja again"
        )
    pairs = [
        (processor, "video_token_id", config, "video_token_id"),
        (processor.video_processor, "patch_size", config.vision_config, "patch_size"),
        (processor.video_processor, "merge_size", config.vision_config, "spatial_merge_size"),
    ]
    for ours, field, theirs, other in pairs:
        values = getattr(ours, field, None), getattr(theirs, other, None)
        if None not in values and values[0] != values[1]:
            raise CheckpointError(
                f"{name}: its processor has {field} {values[0]}, its config.json {other} {values[1]}: copy both "
                "again from where the model was trained"
            )


@dataclass(frozen=True)
class FrameBound:
    """At most ``max_pixels`` a frame, in a video processor's terms: Qwen2-VL's bounds a frame, Qwen3-VL's a clip.

    Raises StormError for a processor of one fixed size, and for a bound below what one visual token shows.
    """

    video: Any
    max_pixels: int

    def __post_init__(self) -> None:
        if self.video.size["shortest_edge"] is None:
            kind = type(self.video).__name__
            raise StormError(f"{kind} has one fixed size: leave max_pixels out")
        if self.max_pixels < self.token:
            raise StormError(
                f"max_pixels is {self.max_pixels}, and a visual token alone is {self.token} pixels"
            )

    @property
    def token(self) -> int:
        """Pixels of a frame that one visual token shows."""
        return (self.video.patch_size * self.video.merge_size) ** 2

    @cached_property
    def of_clip(self) -> bool:
        """Whether the processor bounds the pixels of all frames together: then more frames make each smaller."""
        side, step = 8 * self.video.patch_size * self.video.merge_size, least_frames(self.video)
        size = {"shortest_edge": 1, "longest_edge": 16 * self.token * step}
        _, *few = video_grid(self.video, step, side, side, size)
        _, *many = video_grid(self.video, 8 * step, side, side, size)
        return few != many

    def size(self, num_frames: int) -> dict[str, int]:
        """The processor's ``size`` for a clip. Its lower bound stays, unless it lifts frames above the upper one."""
        # Where `cap_pixels_per_frame` holds, `resize` leaves each frame 1.05 times the lower bound.
        least = min(self.video.size["shortest_edge"], int(self.max_pixels / 1.05))
        if not self.of_clip:
            return {"shortest_edge": least, "longest_edge": self.max_pixels}
        step = least_frames(self.video)
        counted = min(num_frames, round(num_frames / step) * step)  # as `smart_resize` counts
        return {"shortest_edge": least, "longest_edge": self.max_pixels * max(counted, step)}


def least_frames(video: Any) -> int:
    """Of a clip, for a video processor: some pad a lone frame to a temporal patch, others refuse it."""
    return getattr(video, "temporal_patch_size", None) or 1


def blank_clip(
    video: Any, num_frames: int, height: int, width: int, size: dict[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """A video processor's tensors of a clip without storage (torch's ``meta``), numbers of patches among them.

    A processor that looks at pixels, to drop tokens that tell nothing new, is run on a black clip.
    """
    options: dict[str, Any] = {"do_sample_frames": False, "return_tensors": "pt"}
    if hasattr(video, "cap_pixels_per_frame"):  # as the collator does
        options["cap_pixels_per_frame"] = video.cap_pixels_per_frame is not False
    if size is not None:
        options["size"] = size
    shape = max(num_frames, least_frames(video)), 3, height, width

    def processed(device: str) -> Any:
        return video(videos=[torch.zeros(shape, dtype=torch.uint8, device=device)], **options)

    try:
        try:
            outputs = processed("meta")
        except RuntimeError:  # it looks at the pixels
            outputs = processed("cpu")
    except ValueError as error:
        raise InputError(f"frames of {width} x {height} cannot be resized: {error}") from error
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def video_grid(
    video: Any, num_frames: int, height: int, width: int, size: dict[str, int] | None = None
) -> tuple[int, int, int]:
    """Patches of a clip (time, height, width), of which `blank_clip` tells."""
    grid = blank_clip(video, num_frames, height, width, size)["video_grid_thw"][0]
    frames, height, width = grid.tolist()
    return frames, height, width
