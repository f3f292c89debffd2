"""Load a stock checkpoint as a model that reasons in latent slots.

transformers looks checkpoint key conversion up by class name and skips classes from outside its own
modules: a subclass with its own ``from_pretrained`` would silently re-initialise the language
model. So the *stock* class is loaded, and then the instance's class is swapped for a subclass that
keeps the stock name and module. Saved checkpoints stay stock checkpoints, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from storm_vlm.model.generation import LatentRolloutMixin
from storm_vlm.model.positions import TrainedPositions


class StormForConditionalGeneration:
    """Entry point in the manner of transformers; instances are the stock class plus
    `LatentRolloutMixin`."""

    def __init__(self) -> None:
        raise TypeError("use StormForConditionalGeneration.from_pretrained(path)")

    @classmethod
    def from_pretrained(
        cls, path: str, *, dtype: Any = None, trust_remote_code: bool = False, **kwargs: Any
    ) -> Any:
        """Load a Qwen2.5-VL style checkpoint, in the hub's format or saved by us.

        Args:
            path: folder or hub name; a folder of adapters is loaded with its base model and merged into it.
            dtype: a torch dtype; None takes the checkpoint's.
            trust_remote_code: as in transformers.
            **kwargs: for the stock ``from_pretrained`` (``device_map``, ...).

        Raises:
            ValueError: a tensor of the model is missing from the checkpoint or the other way round.
        """
        if (Path(path) / "adapter_config.json").is_file():
            kwargs |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
            return _with_adapters(cls, path, kwargs)
        load: Any = AutoModelForImageTextToText.from_pretrained
        model, report = load(
            path,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **{**kwargs, "output_loading_info": True},
        )
        problems = {
            kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys")
        }
        if any(problems.values()):
            shown = "; ".join(
                f"{len(keys)} {kind}: {keys[:3]}" for kind, keys in problems.items() if keys
            )
            raise ValueError(
                f"{path} does not fit {type(model).__name__} ({shown}): pass a complete checkpoint"
            )
        return enable_latents(model)


def _with_adapters(cls: Any, path: str, kwargs: dict[str, Any]) -> Any:
    settings = PeftConfig.from_pretrained(path)
    model = cls.from_pretrained(settings.base_model_name_or_path, **kwargs)
    model.config = AutoConfig.from_pretrained(path)  # the base's, and the latent tokens
    return PeftModel.from_pretrained(model, path).merge_and_unload()


def enable_latents(model: Any) -> Any:
    """Give a loaded stock model the latent rollout, in place; twice is harmless.

    A Qwen2.5-VL model also gets the position rule it was trained with (`storm_vlm.model.positions`), with
    or without latents.

    Returns:
        The same object.

    Raises:
        TypeError: not a transformers model that generates.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(
            f"enable_latents needs a transformers model with generate(), got {type(model).__name__}"
        )
    if not isinstance(model, LatentRolloutMixin):
        body = {"forward": _open(type(model).forward)}
        model.__class__ = _subclass(type(model), (LatentRolloutMixin,), **body)
        if model.config.model_type == "qwen2_5_vl":
            model.model.__class__ = _subclass(type(model.model), (TrainedPositions, FrozenTower))
    return model


def _subclass(stock: Any, mixins: tuple[type, ...], **body: Any) -> type:
    """It still bears the stock name and module, on which transformers keys its conversions."""
    return type(stock.__name__, (*mixins, stock), {"__module__": stock.__module__, **body})


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
        wanted = pixels.requires_grad or any(p.requires_grad for p in self.visual.parameters())
        return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


def _open(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The stock ``forward``, through which something else can be computed: ``model(compute=f)`` is ``f(model)``.

    DDP, FSDP and PEFT make a model ready, and collect its gradients, around one call of its ``forward``. A rollout
    is several passes, and must lie within one such call. `inspect.signature`, by which ``generate`` learns what
    a model can do, still sees the stock one.
    """

    @functools.wraps(stock_forward)
    def forward(
        self: Any, *args: Any, compute: Callable[[Any], Any] | None = None, **kw: Any
    ) -> Any:
        return stock_forward(self, *args, **kw) if compute is None else compute(self)

    return forward
