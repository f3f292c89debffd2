"""What the method needs to know of a backbone: one small adapter a ``config.model_type``.

Training, the features of the vision tower and all that reads states needs an adapter; the latent rollout in
``generate`` does not. How to write one: `docs/backbones.md`.

Shapes as everywhere: B batch, T tokens, N visual tokens, D hidden; F is D, or several D beside each other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storm_vlm.model.positions import TrainedPositions
from storm_vlm.model.tokens import LatentError
from storm_vlm.registry import Registry

_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class Backbone:
    """A loaded model as the method sees it, in the layout of transformers' Qwen-VL; a port overrides what differs.

    Another package registers its own with ``@BACKBONES.register("<model_type>")``.
    """

    #: What the class of `core` is extended with, in front of the stock class.
    core_mixins: tuple[type, ...] = ()
    #: What a batch calls the pixels of its clips.
    pixels = "pixel_values_videos"

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def core(self) -> Any:
        """Vision tower and decoder, without the output layer."""
        return self.model.model

    @property
    def vision_tower(self) -> nn.Module:
        """All that makes `video_features`; frozen by default."""
        return self.core.visual

    @property
    def decoder(self) -> Any:
        """The language model's layers (``decoder.layers``) and final norm."""
        return self.core.language_model

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def video_token_id(self) -> int:
        """The id that stands for one visual token of a video."""
        return self.model.config.video_token_id

    def positions(self, batch: Mapping[str, Any]) -> Tensor:
        """Positions (..., B, T) of a batch of prompts; what is appended to one counts on from its last."""
        ids, types = batch["input_ids"], batch.get("mm_token_type_ids")
        positions, _ = self.core.get_rope_index(
            ids,
            mm_token_type_ids=torch.zeros_like(ids) if types is None else types,
            attention_mask=batch.get("attention_mask"),
            **{name: batch[name] for name in _GRIDS if batch.get(name) is not None},
        )
        return positions

    def encode(self, batch: Mapping[str, Any]) -> Tensor:
        """What the tower makes of a batch's clips, (N, F), in the order of their tokens.

        The first D columns go where the tokens' embeddings would; `deeper` says where others go.
        """
        output = self.core.get_video_features(batch[self.pixels], batch["video_grid_thw"])
        return torch.cat(list(output.pooler_output))

    def visual_tokens(self, features: Tensor, clip: Mapping[str, Tensor]) -> Tensor:
        """What of one clip's features (N, F) alignment targets are pooled from: (grids, height, width, D)."""
        merge = self.model.config.vision_config.spatial_merge_size
        grids, height, width = clip["video_grid_thw"][0].tolist()
        shape = grids, height // merge, width // merge
        return features[:, : self.hidden_size].unflatten(0, shape)

    def deeper(self, features: Tensor, places: Tensor) -> dict[str, Any]:
        """What the decoder takes of features (N, F) besides embeddings; `places` (B, T): where their tokens are."""
        return {}

    def video_features(self, batch: Mapping[str, Any]) -> Tensor:
        """`encode`, differentiated only as far as the tower trains.

        Checkpointing makes every embedding's output require a gradient, the tower's patches included: a frozen one
        would be run again in backward, for nothing (a seventh of a 7B's step).
        """
        trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self.encode(batch)

    def prompt_inputs(
        self, batch: Mapping[str, Any], added: int = 0
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings (B, T, D) of a batch of prompts, and what else the decoder takes of their clips.

        A batch may hold `video_features` (N, F), computed beforehand, instead of pixels. `added`: embeddings that
        will be appended.

        Raises:
            LatentError: features and video tokens differ in number, or there are pictures.
        """
        ids, features = batch["input_ids"], batch.get("video_features")
        if "pixel_values" in batch and self.pixels != "pixel_values":
            raise LatentError("rollouts read videos, no pictures: make each a video of one frame")
        if features is None and batch.get(self.pixels) is not None:
            features = self.video_features(batch)
        embeds, places = self.model.get_input_embeddings()(ids), ids == self.video_token_id
        count = 0 if features is None else len(features)
        if int(places.sum()) != count:
            raise LatentError(f"{count} video_features for {int(places.sum())} video tokens")
        if features is None:
            return embeds, {}
        shown = features[:, : self.hidden_size].to(embeds)
        embeds = embeds.masked_scatter(places.unsqueeze(-1), shown)
        return embeds, self.deeper(features.to(embeds), F.pad(places, (0, added)))

    def decode(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Any = None, **more: Any
    ) -> Tensor:
        """The decoder's last states (B, n, D) of embeddings (B, n, D), at positions (..., B, n)."""
        if cache is not None:
            more[cache_argument(self.decoder)] = cache
        return self.decoder(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,  # it would only warn: the layers write to a cache that is given all the same
            **more,
        ).last_hidden_state


class QwenVL(Backbone):
    """Qwen2-VL and Qwen2.5-VL, with the position rule they were trained with."""

    core_mixins = (TrainedPositions,)


class Qwen3VL(Backbone):
    """Qwen3-VL and its MoE: features of some tower layers are added behind the first decoder layers (deepstack)."""

    def encode(self, batch: Mapping[str, Any]) -> Tensor:
        output = self.core.get_video_features(batch[self.pixels], batch["video_grid_thw"])
        levels = [output.pooler_output, *output.deepstack_features]
        whole = (level if isinstance(level, Tensor) else torch.cat(level) for level in levels)
        return torch.cat(list(whole), -1)

    def deeper(self, features: Tensor, places: Tensor) -> dict[str, Any]:
        levels = features.split(self.hidden_size, -1)[1:]
        return {"visual_pos_masks": places, "deepstack_visual_embeds": list(levels)}


class Glm4V(Backbone):
    """GLM-4.1V to 4.6V: a video is pictures with their times between them."""

    @property
    def video_token_id(self) -> int:
        return self.model.config.image_token_id


class Llava(Backbone):
    """LLaVA-OneVision: as many tokens for every frame, then one for the line's end; positions count tokens."""

    @property
    def vision_tower(self) -> nn.Module:
        tower = nn.Module()
        tower.encoder, tower.projector = self.core.vision_tower, self.core.multi_modal_projector
        if hasattr(self.core, "image_newline"):
            tower.newline = self.core.image_newline
        return tower

    def positions(self, batch: Mapping[str, Any]) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.long()
        return (mask.cumsum(-1) - 1).clamp_min(0)

    @property
    def _side(self) -> int:
        vision = self.model.config.vision_config
        return math.ceil(vision.image_size // vision.patch_size / 2)

    def encode(self, batch: Mapping[str, Any]) -> Tensor:
        pixels = batch[self.pixels]
        features = self.core.get_video_features(pixels).pooler_output
        if features.shape[1] == pixels.shape[1] * self._side**2:  # transformers 5.17 ends it later
            end = self.core.image_newline.to(features).expand(len(features), 1, -1)
            features = torch.cat([features, end], 1)
        return features.flatten(0, 1)

    def visual_tokens(self, features: Tensor, clip: Mapping[str, Tensor]) -> Tensor:
        return features[:-1].unflatten(0, (-1, self._side, self._side))


class InternVL(Llava):
    """InternVL3: a video is pictures, numbered in the text."""

    pixels = "pixel_values"

    @property
    def video_token_id(self) -> int:
        return self.model.config.image_token_id

    def encode(self, batch: Mapping[str, Any]) -> Tensor:
        return self.core.get_image_features(batch[self.pixels]).pooler_output.flatten(0, 1)

    def visual_tokens(self, features: Tensor, clip: Mapping[str, Tensor]) -> Tensor:
        config = self.model.config
        (size, _), (patch, _) = config.vision_config.image_size, config.vision_config.patch_size
        side = int(size // patch * config.downsample_ratio)
        return features.unflatten(0, (-1, side, side))


BACKBONES: Registry[type[Backbone]] = Registry(
    "backbones",
    {
        model_type: f"{__name__}:{adapter}"
        for adapter, model_types in {
            "QwenVL": ("qwen2_5_vl", "qwen2_vl"),
            "Qwen3VL": ("qwen3_vl", "qwen3_vl_moe"),
            "Backbone": ("qwen3_5", "qwen3_5_moe"),
            "Glm4V": ("glm4v", "glm4v_moe", "glm46v"),
            "Llava": ("llava_onevision",),
            "InternVL": ("internvl",),
        }.items()
        for model_type in model_types
    },
)


def backbone(model: Any) -> Backbone:
    """The adapter of a model, PEFT-wrapped or not. Raises LatentError if none is registered for its type."""
    model = unwrap(model)
    return BACKBONES[supported(model.config.model_type)](model)


def supported(model_type: str) -> str:
    """The type itself. Raises LatentError if it has no adapter."""
    if model_type not in BACKBONES:
        raise LatentError(
            f"storm trains {', '.join(BACKBONES)}, not {model_type}: to add it, see docs/backbones.md"
        )
    return model_type


def unwrap(model: Any) -> Any:
    """The transformers model beneath PEFT, whose adapters live inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cache_argument(module: nn.Module) -> str:
    """What this module's ``forward`` calls its cache; transformers 5.24 renamed it."""
    names = inspect.signature(module.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def input_device(model: Any) -> torch.device:
    """Where a model's inputs belong: where its embedding layer is, or where accelerate brings that when it is needed.

    `model.device` is `meta` for a model whose weights are offloaded.
    """
    embedding = unwrap(model).get_input_embeddings()
    device = embedding.weight.device
    return embedding._hf_hook.execution_device if device.type == "meta" else device
