"""STORM: video-language models that reason in continuous latent slots."""

from storm_vlm.modeling import StormForConditionalGeneration, enable_latents
from storm_vlm.pipeline import Answer, StormPipeline
from storm_vlm.tokens import add_latent_tokens

__all__ = [
    "Answer",
    "StormForConditionalGeneration",
    "StormPipeline",
    "add_latent_tokens",
    "enable_latents",
]
