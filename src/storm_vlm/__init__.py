"""STORM: video-language models that reason in continuous latent slots."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storm_vlm.inference.pipeline import Answer, StormPipeline
    from storm_vlm.model.modeling import StormForConditionalGeneration, enable_latents
    from storm_vlm.model.tokens import add_latent_tokens

__all__ = [
    "Answer",
    "StormForConditionalGeneration",
    "StormPipeline",
    "add_latent_tokens",
    "enable_latents",
]
_HOMES = {
    "Answer": "inference.pipeline",
    "StormForConditionalGeneration": "model.modeling",
    "StormPipeline": "inference.pipeline",
    "add_latent_tokens": "model.tokens",
    "enable_latents": "model.modeling",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: most verbs of `storm` need no torch, and start at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
