"""Wan 2.1 (paper section 3.2, step 2) and 2.2 image to video, by diffusers' own pipeline.

Which of them a checkpoint is, its parts tell: 2.1 has an image encoder, and FLF2V places for two pictures; 2.2 A14B a
second transformer for low noise, and takes a last picture; 2.2 5B has times of its own for each token, 24 frames a
second, and sides of multiples of 32.
"""

from __future__ import annotations

from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from storm_vlm.construction.generators.image_to_video import (
    Ends,
    ImageToVideo,
    ImageToVideoConfig,
)
from storm_vlm.errors import StormError


class WanConfig(ImageToVideoConfig):
    """Wan image to video, with the values of 2.1's model card; the paper states none.

    VAE and image encoder keep float32. `area`: 720*1280 for 720P models.
    """

    model: str = Field("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", description="Folder or hub name.")
    guidance_2: float | None = Field(
        None, description="Wan 2.2 A14B: of its low-noise transformer; None: as `guidance`."
    )
    flow_shift: float | None = Field(None, description="Of the scheduler; None: the checkpoint's.")
    lora_2: str | None = Field(
        None, description="Wan 2.2 A14B: of its low-noise transformer; None: where `lora` is."
    )
    lora_file_2: str | None = Field(None, description="Its file.")


class Wan(ImageToVideo):
    Config = WanConfig
    pipeline = "WanImageToVideoPipeline"
    precise: ClassVar[tuple[str, ...]] = ("vae", "image_encoder")

    def fps(self) -> float:
        return 24.0 if self._pipe.config.expand_timesteps else 16.0  # what each was trained on

    def multiple(self) -> int:
        return self._pipe.vae_scale_factor_spatial * self._pipe.transformer.config.patch_size[1]

    def ends(self) -> Ends:
        transformer = self._pipe.transformer.config
        if transformer.pos_embed_seq_len is not None:
            return "always"
        return "never" if transformer.image_dim or self._pipe.config.expand_timesteps else "either"

    def call(self, image: Image.Image, last: Image.Image | None) -> dict[str, Any]:
        config = self.config
        given = {"image": image, "last_image": last, "height": image.height, "width": image.width}
        second = {} if config.guidance_2 is None else {"guidance_scale_2": config.guidance_2}
        return {**given, "guidance_scale": config.guidance, **second}

    def prepare(self, pipe: Any) -> None:
        from diffusers import UniPCMultistepScheduler  # pyright: ignore[reportPrivateImportUsage]

        config, two = self.config, pipe.transformer_2 is not None
        second = config.lora_2 or config.lora_file_2
        if not two and (second or config.guidance_2 is not None):
            raise StormError(
                f"{self.name} has one transformer: leave out guidance_2, lora_2 and lora_file_2"
            )
        if two and bool(config.lora) != bool(second):
            raise StormError(
                f"{self.name} has two transformers, and a LoRA for one alone would spoil its videos: name the "
                "high-noise one by lora and lora_file, the low-noise one by lora_2 or lora_file_2"
            )
        super().prepare(pipe)
        if two and config.lora:
            where = config.lora_2 or config.lora
            pipe.load_lora_weights(
                where, weight_name=config.lora_file_2, load_into_transformer_2=True
            )
        if config.flow_shift is not None:
            pipe.scheduler = UniPCMultistepScheduler.from_config(
                pipe.scheduler.config, flow_shift=config.flow_shift
            )
