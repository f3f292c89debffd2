"""Wan 2.1 image to video (paper section 3.2, step 2), by diffusers' own pipeline."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from storm_vlm.configs import Settings
from storm_vlm.construction.types import Generator, Imagined, Rejected, Request
from storm_vlm.errors import StormError
from storm_vlm.model.device import torch_device

FPS = 16.0  # what Wan was trained on


class WanConfig(Settings):
    """Wan 2.1 image to video, with the values of its model card; the paper states none."""

    model: str = Field("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", description="Folder or hub name.")
    revision: str | None = None
    device: str = Field("cuda", description="cpu for a tiny model only.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Of transformer and text encoder; VAE and image encoder keep float32.",
    )
    area: int = Field(480 * 832, ge=256, description="Pixels of a frame; 720*1280 for 720P models.")
    num_frames: int = Field(81, ge=5, description="4n + 1; at 16 frames a second.")
    steps: int = Field(40, ge=1, description="Of denoising; 4 with a step-distilled LoRA.")
    guidance: float = Field(5.0, description="1 with a step-distilled LoRA: no second pass.")
    flow_shift: float | None = Field(None, description="Of the scheduler; None: the checkpoint's.")
    negative_prompt: str = "camera shake, still picture, subtitles, text overlay, blurred, deformed"
    conditioning: Literal["first", "first_last", "chain"] = Field(
        "first",
        description="`first` keyframe, as in the paper; `first_last` (FLF2V checkpoints) ends at the last one; "
        "`chain` joins segments, each from one keyframe to the next.",
    )
    lora: str | None = Field(None, description="Folder, file or hub name of a step-distilled LoRA.")
    lora_file: str | None = Field(None, description="Its file, where a hub name holds several.")
    offload: Literal["none", "model", "group"] = Field(
        "none", description="`model`: whole parts wait in main memory; `group`: single blocks do."
    )

    @model_validator(mode="after")
    def _frames_fit(self) -> WanConfig:
        if self.num_frames % 4 != 1:
            raise ValueError(f"num_frames must be 4n + 1 (33, 49, 81), got {self.num_frames}")
        return self


class Wan(Generator):
    """Animates the first keyframe, or leads from keyframe to keyframe. Loads at the first request.

    VAE and image encoder stay in fp32, as the model card asks. One video at a time: a lock keeps the threads of a
    run apart.
    """

    Config = WanConfig
    needs_prompt: ClassVar[bool] = True

    def __init__(self, config: WanConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.name = config.model
        self.on_gpu = config.device.startswith("cuda")
        self._lock = threading.Lock()
        self._pipe: Any = None

    def settings(self) -> dict[str, Any]:
        free = {"device", "offload"}  # where it runs, not what comes out
        return {"pipeline": "WanImageToVideoPipeline", **self.config.model_dump(exclude=free)}

    def determined_by(self, request: Request) -> dict[str, Any]:
        return super().determined_by(replace(request, keyframes=self._used(request)))

    def imagine(self, request: Request) -> Imagined:
        import torch

        with self._lock:
            self._pipe = self._pipe or load(self.config)
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            frames = self._animate(self._used(request), request.prompt)
            costs = {"seconds": time.perf_counter() - began}
            if self.on_gpu:
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
            raise StormError(f"{self.name} cannot end at a given frame: name an FLF2V checkpoint")
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


def load(config: WanConfig) -> Any:
    """The pipeline, on its device.

    Raises:
        StormError: diffusers is missing.
        OSError: no such folder or repository.
    """
    try:
        import torch
        from diffusers import (
            UniPCMultistepScheduler,  # pyright: ignore[reportPrivateImportUsage]
            WanImageToVideoPipeline,  # pyright: ignore[reportPrivateImportUsage]
        )
    except ImportError as error:
        raise StormError("Wan needs diffusers: pip install 'storm-vlm[build]'") from error
    device = torch_device(config.device)
    kept = {"vae": torch.float32, "image_encoder": torch.float32}
    pipe = WanImageToVideoPipeline.from_pretrained(
        config.model,
        revision=config.revision,
        dtype={**kept, "default": getattr(torch, config.dtype)},
    )
    pipe.set_progress_bar_config(disable=True)
    if config.flow_shift is not None:
        pipe.scheduler = UniPCMultistepScheduler.from_config(
            pipe.scheduler.config, flow_shift=config.flow_shift
        )
    if config.lora:
        pipe.load_lora_weights(config.lora, weight_name=config.lora_file)
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "group":
        pipe.enable_group_offload(
            onload_device=device, offload_type="block_level", num_blocks_per_group=1
        )
    else:
        pipe.to(device)
    return pipe
