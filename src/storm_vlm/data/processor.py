"""Whether a checkpoint's processor and its model belong together."""

from __future__ import annotations

from typing import Any

import numpy as np

from storm_vlm.data.prompt import build_messages, render_prompt
from storm_vlm.data.video import Clip, video_metadata
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
