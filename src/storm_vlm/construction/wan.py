"""Wan 2.1 image to video (paper section 3.2, step 2), by diffusers' own pipeline."""

from __future__ import annotations

import math
import threading
import time
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from storm_vlm.construction.config import BuildConfig
from storm_vlm.construction.generators import (
    Imagined,
    Rejected,
    Request,
    Source,
    pixels_hash,
)

FPS = 16.0  # what Wan was trained on


class Wan:
    """Animates the first keyframe, or leads from keyframe to keyframe. Loads at the first request.

    VAE and image encoder stay in fp32, as the model card asks. One video at a time: a lock keeps the threads of a
    run apart.
    """

    source: ClassVar[Source] = "generated"
    needs_prompt: ClassVar[bool] = True

    def __init__(self, config: BuildConfig) -> None:
        self.config = config.wan
        self.seed = config.seed
        self.name = config.wan.model
        self._lock = threading.Lock()
        self._pipe: Any = None

    def settings(self) -> dict[str, Any]:
        free = {"device", "offload"}  # where it runs, not what comes out
        return {"pipeline": "WanImageToVideoPipeline", **self.config.model_dump(exclude=free)}

    def determined_by(self, request: Request) -> dict[str, Any]:
        used = self._used(request)
        return {"keyframes": [pixels_hash(frame) for frame in used], "prompt": request.prompt}

    def imagine(self, request: Request) -> Imagined:
        import torch

        with self._lock:
            self._pipe = self._pipe or load(self.config.model_dump())
            on_gpu = torch.device(self.config.device).type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            frames = self._animate(self._used(request), request.prompt)
            costs = {"seconds": time.perf_counter() - began}
            if on_gpu:
                costs["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return Imagined(frames, FPS, costs)

    def _used(self, request: Request) -> tuple[np.ndarray, ...]:
        """The keyframes that the conditioning looks at."""
        frames = request.keyframes
        if self.config.conditioning == "chain":
            return frames
        if self.config.conditioning == "first":
            return frames[:1]
        if len(frames) < 2:
            raise Rejected("one_keyframe", "first_last needs two keyframes: one to end at")
        return frames[0], frames[-1]

    def _animate(self, keyframes: tuple[np.ndarray, ...], prompt: str) -> np.ndarray:
        images = [fit(frame, self.config.area) for frame in keyframes]
        ends_at = self._pipe.transformer.config.pos_embed_seq_len is not None  # FLF2V checkpoints
        if self.config.conditioning == "first_last" and not ends_at:
            raise ValueError(f"{self.name} cannot end at a given frame: name an FLF2V checkpoint")
        if ends_at and len(images) < 2:
            raise Rejected("one_keyframe", f"{self.name} needs a frame to end at")
        if not ends_at:  # each segment begins at a keyframe; with one keyframe there is one
            return np.concatenate([self._segment(image, None, prompt) for image in images])
        segments = [self._segment(image, after, prompt) for image, after in pairwise(images)]
        return np.concatenate([*(segment[:-1] for segment in segments), segments[-1][-1:]])

    def _segment(self, image: Image.Image, last: Image.Image | None, prompt: str) -> np.ndarray:
        """(num_frames, H, W, 3) uint8; the same seed gives the same video."""
        import torch

        output = self._pipe(
            image=image,
            last_image=last,
            prompt=prompt,
            negative_prompt=self.config.negative_prompt,
            height=image.height,
            width=image.width,
            num_frames=self.config.num_frames,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            generator=torch.Generator("cpu").manual_seed(self.seed),
            output_type="np",
        )
        return (output.frames[0] * 255).round().astype(np.uint8)


def fit(frame: np.ndarray, area: int) -> Image.Image:
    """The frame at about `area` pixels, its shape kept, sides multiples of 16."""
    ratio = frame.shape[0] / frame.shape[1]
    height = max(round(math.sqrt(area * ratio)) // 16, 1) * 16
    width = max(round(math.sqrt(area / ratio)) // 16, 1) * 16
    return Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)


def load(wan: dict[str, Any]) -> Any:
    """The pipeline of `WanConfig`'s fields, on its device.

    Raises:
        ValueError: diffusers is missing.
        OSError: no such folder or repository.
    """
    try:
        import torch
        from diffusers import (
            UniPCMultistepScheduler,  # pyright: ignore[reportPrivateImportUsage]
            WanImageToVideoPipeline,  # pyright: ignore[reportPrivateImportUsage]
        )
    except ImportError as error:
        raise ValueError("Wan needs diffusers: pip install 'storm-vlm[build]'") from error
    device = torch.device(wan["device"])
    kept = {"vae": torch.float32, "image_encoder": torch.float32}
    pipe = WanImageToVideoPipeline.from_pretrained(
        wan["model"],
        revision=wan["revision"],
        dtype={**kept, "default": getattr(torch, wan["dtype"])},
    )
    pipe.set_progress_bar_config(disable=True)
    if wan["flow_shift"] is not None:
        scheduler = pipe.scheduler.config
        shift = wan["flow_shift"]
        pipe.scheduler = UniPCMultistepScheduler.from_config(scheduler, flow_shift=shift)
    if wan["lora"]:
        pipe.load_lora_weights(wan["lora"], weight_name=wan["lora_file"])
    if wan["offload"] == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif wan["offload"] == "group":
        pipe.enable_group_offload(
            onload_device=device, offload_type="block_level", num_blocks_per_group=1
        )
    else:
        pipe.to(device)
    return pipe
