"""HunyuanVideo 1.5 image to video by diffusers' own pipeline, which chooses the size itself."""

from __future__ import annotations

from typing import Any

from PIL import Image
from pydantic import Field

from storm_vlm.construction.generators.image_to_video import (
    Ends,
    ImageToVideo,
    ImageToVideoConfig,
)


class HunyuanVideoConfig(ImageToVideoConfig):
    """HunyuanVideo 1.5, with the values of diffusers' pipeline. `area` is what the picture is scaled to before."""

    model: str = Field(
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
        description="Folder or hub name.",
    )
    num_frames: int = Field(121, ge=5, description="4n + 1, at 24 a second.")
    steps: int = Field(50, ge=1, description="Of denoising; few with a step-distilled checkpoint.")
    guidance: float = Field(6.0, description="1 with a step-distilled checkpoint.")


class HunyuanVideo(ImageToVideo):
    Config = HunyuanVideoConfig
    pipeline = "HunyuanVideo15ImageToVideoPipeline"

    def fps(self) -> float:
        return 24.0

    def multiple(self) -> int:
        return self._pipe.vae_scale_factor_spatial

    def ends(self) -> Ends:
        return "never"

    def call(self, image: Image.Image, last: Image.Image | None) -> dict[str, Any]:
        return {"image": image}

    def prepare(self, pipe: Any) -> None:
        pipe.guider = pipe.guider.new(guidance_scale=self.config.guidance)
        super().prepare(pipe)
