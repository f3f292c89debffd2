"""Visual gain: how much likelier the answer is to a model that sees the thought video behind the clip.

A thought video that shows something else than what happens makes the right answer less likely, one that shows nothing
of it leaves it as it is. The model is any that reads videos; it writes nothing, so this costs two prompts a row.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from storm_vlm.data.collator import StormCollator
from storm_vlm.data.row import Row, ThoughtVideo
from storm_vlm.data.video import Clip, read_video
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.backbones import input_device
from storm_vlm.model.rollout import rollout


class VisualGain:
    """p(answer | clip, thought video) - p(answer | clip), by a model from a folder or the hub."""

    def __init__(self, model: str) -> None:
        pipeline = StormPipeline.from_pretrained(model, latent_mode="off")
        self._model, videos = pipeline.model, pipeline.collator.videos
        # Half of them for either; of the clip the same ones both times.
        self._frames = max(1, videos.num_frames // 2)
        self._collator = StormCollator(pipeline.processor, self._frames, 0, videos)

    def __call__(self, row: Row) -> float:
        """Between -1 and 1; 0 without a thought video. Raises VideoError."""
        if (thought := row.thought_video) is None:
            return 0.0
        clip = read_video(row.video, self._frames, row.start, row.end)
        both = followed_by(clip, thought, self._frames)
        return self._probability(row, both) - self._probability(row, clip)

    @torch.inference_mode()
    def _probability(self, row: Row, clip: Clip) -> float:
        """Of the answer and its end."""
        asked = row.model_copy(update={"video": clip})
        device = input_device(self._model)
        batch = {name: value.to(device) for name, value in self._collator([asked]).items()}
        found = rollout(self._model, batch, 0).logits.float().log_softmax(-1)
        return float(found.gather(-1, batch["labels"][..., None]).sum().exp())


def followed_by(clip: Clip, thought: ThoughtVideo, num_frames: int) -> Clip:
    """The clip, and then the thought video, in frames of the clip's size and at its rate."""
    frames = read_video(thought.path, num_frames, thought.start, thought.end).frames
    height, width = clip.frames.shape[1:3]
    if frames.shape[1:3] != (height, width):
        frames = np.stack([np.asarray(Image.fromarray(f).resize((width, height))) for f in frames])
    later = clip.timestamps[-1] + np.arange(1, len(frames) + 1) / clip.fps
    return Clip(np.concatenate([clip.frames, frames]), np.r_[clip.timestamps, later], clip.path)
