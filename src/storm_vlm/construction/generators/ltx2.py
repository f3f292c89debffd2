"""LTX-2 image to video by diffusers' own pipelines; its sound is left aside."""

from __future__ import annotations

from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from storm_vlm.construction.generators.image_to_video import (
    Ends,
    ImageToVideo,
    ImageToVideoConfig,
)


class LTX2Config(ImageToVideoConfig):
    """LTX-2, with the values of diffusers' pipeline."""

    stride: ClassVar[int] = 8

    model: str = Field("Lightricks/LTX-2", description="Folder or hub name.")
    area: int = Field(512 * 768, ge=1024, description="Pixels of a frame.")
    num_frames: int = Field(121, ge=9, description="8n + 1, at `frame_rate`.")
    frame_rate: float = Field(24.0, gt=0, description="That the model is told to make.")
    steps: int = Field(30, ge=1, description="Of denoising; 8 with the distilled LoRA.")
    guidance: float = Field(3.0, description="1 with the distilled LoRA: no second pass.")


class LTX2(ImageToVideo):
    """`first` by the image-to-video pipeline, the other conditionings by that which takes pictures at any place."""

    Config = LTX2Config
    precise: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: LTX2Config, seed: int) -> None:
        super().__init__(config, seed)
        first = config.conditioning == "first"
        self.pipeline = "LTX2ImageToVideoPipeline" if first else "LTX2ConditionPipeline"

    def fps(self) -> float:
        return self.config.frame_rate

    def multiple(self) -> int:
        return 32  # what both pipelines ask for

    def ends(self) -> Ends:
        return "never" if self.config.conditioning == "first" else "either"

    def call(self, image: Image.Image, last: Image.Image | None) -> dict[str, Any]:
        config = self.config
        given = {"height": image.height, "width": image.width, "frame_rate": config.frame_rate}
        given |= {"guidance_scale": config.guidance}
        if config.conditioning == "first":
            return given | {"image": image}
        from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

        pictures = [LTX2VideoCondition(image, index=0)]
        if last is not None:
            pictures.append(LTX2VideoCondition(last, index=-1))
        return given | {"conditions": pictures}
