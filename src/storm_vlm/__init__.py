"""STORM: video-language models that reason in continuous latent slots."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_HOMES = {
    "Answer": "pipeline",
    "StormForConditionalGeneration": "modeling",
    "StormPipeline": "pipeline",
    "add_latent_tokens": "tokens",
    "enable_latents": "modeling",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: most verbs of `storm` need no torch, and start at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
