"""A training run whose costs are asked for; `planning.py` tells them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from storm_vlm.configs import Settings


class PlanRequest(Settings):
    """A training run. Lengths are tokens per row, sizes pixels."""

    num_frames: int = Field(default=32, ge=1, description="Of a clip.")
    width: int = Field(default=1280, ge=1, description="Of the source's frames, in pixels.")
    height: int = Field(default=720, ge=1, description="Of the source's frames, in pixels.")
    max_pixels: int | None = Field(
        default=None, ge=1, description="Per frame; default: the processor's."
    )
    question_tokens: int = Field(
        default=150, ge=1, description="All of the prompt but visual tokens and <|latent_start|>."
    )
    answer_tokens: int = Field(default=8, ge=1, description="With the end of turn.")
    latent_budget: int = Field(default=8, ge=0, description="K; 0: SFT only.")
    batch_size: int = Field(default=1, ge=1, description="Per device.")
    accumulation: int = Field(default=1, ge=1, description="Batches of a step.")
    devices: int = Field(default=1, ge=1, description="Of one kind.")
    sharding: Literal["none", "zero2", "fsdp"] = Field(
        default="none", description="none: DDP, if there are several devices."
    )
    lora_rank: int = Field(
        default=0,
        ge=0,
        description="0: full fine-tuning; else of adapters on the decoder, and all else is frozen.",
    )
    checkpointing: bool = Field(
        default=False, description="Compute activations again for backward."
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Of weights and computation."
    )
