"""What diffusers' image-to-video pipelines have in common; a family of models adds what only it knows."""

from __future__ import annotations

import math
import threading
import time
from abc import abstractmethod
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

Ends = Literal["never", "always", "either"]  #: whether a model is led to a last picture


class ImageToVideoConfig(Settings):
    """What all families are told; each has defaults of its own."""

    stride: ClassVar[int] = 4  #: frames that one latent frame stands for

    model: str = Field(description="Folder or hub name.")
    revision: str | None = None
    device: str = Field("cuda", description="cpu for a tiny model only.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of transformer and text encoder; see the family for other parts."
    )
    area: int = Field(480 * 832, ge=256, description="Pixels of a frame.")
    num_frames: int = Field(81, ge=5, description="4n + 1, at the model's frame rate.")
    steps: int = Field(40, ge=1, description="Of denoising; 4 with a step-distilled LoRA.")
    guidance: float = Field(5.0, description="1 with a step-distilled LoRA: no second pass.")
    negative_prompt: str = "camera shake, still picture, subtitles, text overlay, blurred, deformed"
    conditioning: Literal["first", "first_last", "chain"] = Field(
        "first",
        description="`first` keyframe, as in the paper; `first_last` ends at the last one, if the model can; "
        "`chain` joins segments, each from one keyframe to the next.",
    )
    lora: str | None = Field(None, description="Folder, file or hub name of a step-distilled LoRA.")
    lora_file: str | None = Field(None, description="Its file, where a hub name holds several.")
    offload: Literal["none", "model", "group"] = Field(
        "none", description="`model`: whole parts wait in main memory; `group`: single blocks do."
    )
    arguments: dict[str, Any] = Field({}, description="More of what the pipeline is called with.")

    @model_validator(mode="after")
    def _frames_fit(self) -> ImageToVideoConfig:
        if self.num_frames % self.stride != 1:
            near = [
                self.num_frames // self.stride * self.stride + i * self.stride + 1 for i in (0, 1)
            ]
            raise ValueError(
                f"num_frames must be {self.stride}n + 1 ({near[0]}, {near[1]}), got {self.num_frames}"
            )
        return self


class ImageToVideo(Generator):
    """Animates the first keyframe, or leads from keyframe to keyframe. Loads at the first request.

    One video at a time: a lock keeps the threads of a run apart.
    """

    needs_prompt: ClassVar[bool] = True
    pipeline: str  #: its class in diffusers
    precise: ClassVar[tuple[str, ...]] = ("vae",)  #: parts that keep float32

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self.name = config.model
        self.on_gpu = config.device.startswith("cuda")
        self._lock = threading.Lock()
        self._pipe: Any = None

    @abstractmethod
    def fps(self) -> float:
        """Frames a second that the loaded model makes."""

    @abstractmethod
    def multiple(self) -> int:
        """What the sides of a frame are to be divided by."""

    @abstractmethod
    def ends(self) -> Ends:
        """Whether the loaded model takes a last picture."""

    @abstractmethod
    def call(self, image: Image.Image, last: Image.Image | None) -> dict[str, Any]:
        """Pictures, size and guidance, as the pipeline calls them."""

    def settings(self) -> dict[str, Any]:
        free = {"device", "offload"}  # where it runs, not what comes out
        return {"pipeline": self.pipeline, **self.config.model_dump(exclude=free)}

    def determined_by(self, request: Request) -> dict[str, Any]:
        return super().determined_by(replace(request, keyframes=self._used(request)))

    def imagine(self, request: Request) -> Imagined:
        import torch

        with self._lock:
            self._pipe = self._pipe or self.load()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            frames = self._animate(self._used(request), request.prompt)
            costs = {"seconds": time.perf_counter() - began}
            if self.on_gpu:
                costs["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            return Imagined(frames, self.fps(), costs)

    def load(self) -> Any:
        """The pipeline, on its device.

        Raises:
            StormError: diffusers is missing, or too old for this family.
            OSError: no such folder or repository.
        """
        config = self.config
        try:
            import diffusers
            import torch

            kind = getattr(diffusers, self.pipeline)
        except (ImportError, AttributeError) as error:
            raise StormError(
                f"{self.pipeline} is diffusers' own: pip install 'storm-vlm[build]'"
            ) from error
        device = torch_device(config.device)
        kept = dict.fromkeys(self.precise, torch.float32)
        pipe = kind.from_pretrained(
            config.model,
            revision=config.revision,
            dtype={**kept, "default": getattr(torch, config.dtype)},
        )
        pipe.set_progress_bar_config(disable=True)
        self.prepare(pipe)
        if config.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif config.offload == "group":
            pipe.enable_group_offload(
                onload_device=device, offload_type="block_level", num_blocks_per_group=1
            )
        else:
            pipe.to(device)
        return pipe

    def prepare(self, pipe: Any) -> None:
        """What is set or loaded before the pipeline goes to its device."""
        if self.config.lora:
            pipe.load_lora_weights(self.config.lora, weight_name=self.config.lora_file)

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
        images = [fit(frame, self.config.area, self.multiple()) for frame in keyframes]
        ends = self.ends()
        if self.config.conditioning == "first_last" and ends == "never":
            raise StormError(
                f"{self.name} cannot end at a given frame: name a model that can (Wan 2.1 FLF2V, Wan 2.2 A14B, "
                "LTX-2), or leave conditioning at first"
            )
        if ends == "always" and len(images) < 2:
            raise Rejected("one_keyframe", f"{self.name} needs a frame to end at")
        if ends == "never" or len(images) < 2:  # each segment begins at a keyframe
            return np.concatenate([self._segment(image, None, prompt) for image in images])
        segments = [self._segment(image, after, prompt) for image, after in pairwise(images)]
        return np.concatenate([*(segment[:-1] for segment in segments), segments[-1][-1:]])

    def _segment(self, image: Image.Image, last: Image.Image | None, prompt: str) -> np.ndarray:
        """(num_frames, H, W, 3) uint8; the same seed gives the same video."""
        import torch

        config = self.config
        given = {
            "prompt": prompt,
            "negative_prompt": config.negative_prompt,
            "num_frames": config.num_frames,
            "num_inference_steps": config.steps,
            "generator": torch.Generator("cpu").manual_seed(self.seed),
            "output_type": "np",
        }
        output = self._pipe(**{**given, **self.call(image, last), **config.arguments})
        return (output.frames[0] * 255).round().astype(np.uint8)


def fit(frame: np.ndarray, area: int, multiple: int = 16) -> Image.Image:
    """The frame at about `area` pixels, its shape kept, sides multiples of `multiple`."""
    ratio = frame.shape[0] / frame.shape[1]
    height = max(round(math.sqrt(area * ratio)) // multiple, 1) * multiple
    width = max(round(math.sqrt(area / ratio)) // multiple, 1) * multiple
    return Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
