"""What the method needs to know of a backbone: one small adapter a ``config.model_type``.

Training, the features of the vision tower and all that reads states needs an adapter; the latent rollout in
``generate`` does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from storm_vlm.model.positions import TrainedPositions
from storm_vlm.registry import Registry

_PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class Backbone:
    """A loaded model as the method sees it, in the layout of transformers' Qwen-VL; a port overrides what differs.

    Another package registers its own with ``@BACKBONES.register("<model_type>")``.
    """

    #: What the class of `core` is extended with, in front of the stock class.
    core_mixins: tuple[type, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def core(self) -> Any:
        """Vision tower and decoder, without the output layer."""
        return self.model.model

    @property
    def vision_tower(self) -> Any:
        return self.core.visual

    @property
    def decoder(self) -> Any:
        """The language model's layers (``decoder.layers``) and final norm."""
        return self.core.language_model

    @property
    def cache_argument(self) -> str:
        """What the decoder calls its cache; transformers 5.24 renamed it."""
        names = inspect.signature(self.decoder.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    @property
    def video_token_id(self) -> int:
        """The id that stands for one visual token of a video."""
        return self.model.config.video_token_id

    def vision_inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What `core` takes of a batch besides ids: pixels and grids."""
        return _present(batch, _PIXELS)

    def positions(self, batch: Mapping[str, Any]) -> Tensor:
        """Positions (3, B, T) of a batch of prompts; what is appended to one counts on from its last."""
        ids, types = batch["input_ids"], batch.get("mm_token_type_ids")
        positions, _ = self.core.get_rope_index(
            ids,
            mm_token_type_ids=torch.zeros_like(ids) if types is None else types,
            attention_mask=batch.get("attention_mask"),
            **_present(batch, _GRIDS),
        )
        return positions


class FrozenTower:
    """A vision tower that does not train is not differentiated.

    Checkpointing makes every embedding's output require a gradient, the tower's patches included: a frozen one would
    be run again in backward, for nothing (a seventh of a 7B's step).
    """

    visual: Any

    # ``generate`` reads these signatures: they must name what the stock ones name.
    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> Any:
        with self._as_far_as_it_trains(pixel_values_videos):
            return super().get_video_features(pixel_values_videos, video_grid_thw, **kwargs)  # type: ignore[misc]

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> Any:
        with self._as_far_as_it_trains(pixel_values):
            return super().get_image_features(pixel_values, image_grid_thw, **kwargs)  # type: ignore[misc]

    def _as_far_as_it_trains(self, pixels: Tensor) -> Any:
        trains = pixels.requires_grad or any(p.requires_grad for p in self.visual.parameters())
        return torch.set_grad_enabled(trains and torch.is_grad_enabled())


class Qwen25VL(Backbone):
    """Qwen2.5-VL, with the position rule it was trained with."""

    core_mixins = (TrainedPositions, FrozenTower)


BACKBONES: Registry[type[Backbone]] = Registry(
    "backbones", {"qwen2_5_vl": "storm_vlm.model.backbones:Qwen25VL"}
)


def backbone(model: Any) -> Backbone:
    """The adapter of a model, PEFT-wrapped or not. Raises UnknownNameError if none is registered for its type."""
    model = unwrap(model)
    return BACKBONES[model.config.model_type](model)


def unwrap(model: Any) -> Any:
    """The transformers model beneath PEFT, whose adapters live inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: Any) -> torch.device:
    """Where a model's inputs belong: where its embedding layer is, or where accelerate brings that when it is needed.

    `model.device` is `meta` for a model whose weights are offloaded.
    """
    embedding = unwrap(model).get_input_embeddings()
    device = embedding.weight.device
    return embedding._hf_hook.execution_device if device.type == "meta" else device


def _present(batch: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: batch[name] for name in names if batch.get(name) is not None}
