# pyright: reportMissingImports=false
"""Clips by our reader, so that vLLM sees the frames and timestamps of training; its own readers choose others."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from typing import Any

from vllm.multimodal.video import VideoLoader

from storm_vlm.data.decode import VideoError
from storm_vlm.data.video import read_video, require_proportions, video_metadata


class StormVideoLoader(VideoLoader):
    """vLLM's ``video_backend`` named ``storm``. A window is ``start`` and ``end``, in seconds."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int, start: float | None = None, end: float | None = None
    ) -> tuple[Any, dict[str, Any]]:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            try:
                clip = read_video(file.name, num_frames, start, end)
                require_proportions(file.name, *clip.frames.shape[1:3])
            except VideoError as error:  # it names the file, which is ours
                raise VideoError(str(error).replace(file.name, "this video")) from None
        return clip.frames, {**asdict(video_metadata(clip)), "do_sample_frames": False}
