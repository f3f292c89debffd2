"""STORM: video-language models that reason in continuous latent slots.

The names in ``__all__`` are the public API: other modules may change between versions without notice. Third-party
parts (backbones, reasoners, ...) plug into the registries, see `storm_vlm.registry`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storm_vlm.analysis.reliance import latent_reliance
    from storm_vlm.data.collator import StormCollator
    from storm_vlm.data.row import Row, ThoughtVideo, read_rows, write_rows
    from storm_vlm.data.video import Clip
    from storm_vlm.errors import StormError
    from storm_vlm.evaluation.question_set import evaluate
    from storm_vlm.inference.pipeline import Answer, StormPipeline
    from storm_vlm.model.modeling import StormForConditionalGeneration, enable_latents
    from storm_vlm.model.tokens import add_latent_tokens
    from storm_vlm.training.config import Method, TrainConfig
    from storm_vlm.training.train import train
    from storm_vlm.training.trainer import StormTrainer

__all__ = [
    "Answer",
    "Clip",
    "Method",
    "Row",
    "StormCollator",
    "StormError",
    "StormForConditionalGeneration",
    "StormPipeline",
    "StormTrainer",
    "ThoughtVideo",
    "TrainConfig",
    "add_latent_tokens",
    "enable_latents",
    "evaluate",
    "latent_reliance",
    "read_rows",
    "train",
    "write_rows",
]
_MODULES = {
    "analysis.reliance": ("latent_reliance",),
    "data.collator": ("StormCollator",),
    "data.row": ("Row", "ThoughtVideo", "read_rows", "write_rows"),
    "data.video": ("Clip",),
    "errors": ("StormError",),
    "evaluation.question_set": ("evaluate",),
    "inference.pipeline": ("Answer", "StormPipeline"),
    "model.modeling": ("StormForConditionalGeneration", "enable_latents"),
    "model.tokens": ("add_latent_tokens",),
    "training.config": ("Method", "TrainConfig"),
    "training.train": ("train",),
    "training.trainer": ("StormTrainer",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: most verbs of `storm` need no torch, and start at once."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
