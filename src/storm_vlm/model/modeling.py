"""Load a stock checkpoint as a model that reasons in latent slots.

transformers looks the conversion of checkpoint keys up by class name, and only for classes of its own modules: a
subclass that loaded itself would start from a random language model. So the *stock* class is loaded, and then the
instance's class is swapped for a subclass with the stock name and module. What is saved is a stock checkpoint, too.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import GENERATION_CONFIG_NAME, output_capturing
from transformers.utils.hub import cached_file

from storm_vlm.model.adapters import adapted_config, merge_adapters
from storm_vlm.model.backbones import BACKBONES, backbone
from storm_vlm.model.checkpoint import ADAPTERS, CheckpointError, base_of, checkpoint_path, loading
from storm_vlm.model.custom_generate import write_custom_generate
from storm_vlm.model.generation import OPTIONS, LatentRolloutMixin, keep_latent_tokens
from storm_vlm.model.model_card import keep_or_write_card
from storm_vlm.model.tokens import LatentError, check_settings

# Parameters. Threads wait for each other after every operation, and a small model's take less than the wait: on cores
# that other programs use, too, two threads were 10 to 400 times slower than one. (The micro models have a million.)
SMALL = 20_000_000


class StormForConditionalGeneration(LatentRolloutMixin):
    """A model that reasons in latent slots. Its instances are also instances of their stock class.

    A subclass ``Mine`` may override what the stock class has; ``Mine.from_pretrained`` gives instances of ``Mine``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            cls.forward = _open(cls.forward)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, PreTrainedModel):
            raise TypeError(f"use {type(self).__name__}.from_pretrained(path)")
        super().__init__(*args, **kwargs)
        _extend_core(self)

    @classmethod
    def from_pretrained(
        cls, path: str, *, dtype: Any = None, trust_remote_code: bool = False, **kwargs: Any
    ) -> Any:
        """Load a checkpoint, in the hub's format or saved by us.

        Args:
            path: folder or hub name; a folder of adapters is loaded with its base model and merged into it.
            dtype: a torch dtype; None takes the checkpoint's.
            trust_remote_code: as in transformers.
            **kwargs: for the stock ``from_pretrained`` (``device_map``, ...).

        Raises:
            CheckpointError: there is no such folder, its weights are damaged, or a tensor of the model is missing
                from the checkpoint or the other way round.
        """
        path = checkpoint_path(path)
        kwargs["trust_remote_code"] = trust_remote_code
        if (Path(path) / ADAPTERS).is_file():
            model = _adapted(cls, Path(path), dtype, kwargs)
        else:
            method = next(base for base in cls.__mro__ if not issubclass(base, PreTrainedModel))
            model = _enable(_stock(path, dtype, kwargs), method)
        model.name_or_path = path  # the base of what will be trained on it
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' own; beside the weights come a model card, and what those need who load them without this
        package (`storm_vlm.model.custom_generate`).
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._write_besides(Path(save_directory))

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        self._write_besides(Path(working_dir))  # saving and uploading may be one call
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_besides(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():  # adapters alone
            return
        write_custom_generate(self, folder)
        keep_or_write_card(folder, self.name_or_path)


def _stock(path: str, dtype: Any, kwargs: dict[str, Any]) -> Any:
    load: Any = AutoModelForImageTextToText.from_pretrained
    wanted = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with loading(path):
        settings = Path(path) / "config.json"
        if settings.is_file() and json.loads(settings.read_text()).get("text_config", {}) is None:
            # transformers would take its default: billions of weights, drawn for minutes
            raise CheckpointError(f"{settings} says nothing of the text model: copy it again")
        model, report = load(path, dtype="auto" if dtype is None else dtype, **{**kwargs, **wanted})
        if (
            Path(path) / "generation_config.json"
        ).is_file():  # else passed over where it is damaged
            ends = GenerationConfig.from_pretrained(path).eos_token_id
            torch.as_tensor([] if ends is None else ends, dtype=torch.long)
    problems = [
        f"{len(report[kind])} {kind}: {sorted(map(str, report[kind]))[:3]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[kind]
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__} ({'; '.join(problems)}): "
            "pass a complete checkpoint"
        )
    return model


def _adapted(cls: Any, folder: Path, dtype: Any, kwargs: dict[str, Any]) -> Any:
    """The base is loaded as it was for training: in the same type of numbers, and rounded to the same few bits."""
    config: Any = adapted_config(folder)
    dtype = getattr(config, "dtype", None) if dtype is None else dtype
    anew = hasattr(config, "quantization_config") and "quantization_config" not in kwargs
    if anew:
        bits = AutoQuantizationConfig.from_dict(config.quantization_config)
        kwargs = {**kwargs, "quantization_config": bits}
    base = cls.from_pretrained(base_of(folder), dtype=dtype, **kwargs)
    return merge_adapters(base.dequantize() if anew else base, folder)


def enable_latents(model: Any) -> Any:
    """Make a loaded stock model a `StormForConditionalGeneration`, in place; twice is harmless.

    Its core also gets what its backbone's adapter says (`storm_vlm.model.backbones`): a Qwen2.5-VL the position rule
    it was trained with. A model type without an adapter gets the latent rollout in ``generate``.
    A small model sets this process to one thread (`SMALL`).

    Returns:
        The same object.

    Raises:
        TypeError: not a transformers model that generates.
        CheckpointError: its config says of the latent segment what cannot be.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(
            f"enable_latents needs a transformers model with generate(), got {type(model).__name__}"
        )
    return _enable(model, StormForConditionalGeneration)


def _enable(model: Any, method: type) -> Any:
    check_settings(model.config)
    if not isinstance(model, method):
        model.__class__ = _extended(type(model), method)
        _extend_core(model)
        _restore_options(model)
    keep_latent_tokens(model.generation_config, model.config)
    vars(model).pop("generate", None)  # a checkpoint's custom_generate is this method
    if sum(parameter.numel() for parameter in model.parameters()) <= SMALL:
        torch.set_num_threads(1)
    return model


class SlotGuard:
    """Mixed into a model's core, through which every forward goes, a trainer's own around its output layer, too.

    It knows only the pad's embedding where ``generate`` had fed a state; whoever computed with it would get other
    probabilities than the sequence was sampled with. So ids of latent slots are refused. And where ``generate`` asks
    for the last state alone, it is the core's output: transformers would have hooks in every layer look for it.
    """

    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("inputs_embeds") is None:
            _refuse_slots(self.config, input_ids)
        if is_last := kwargs.get("output_hidden_states") == [-1]:
            kwargs["output_hidden_states"] = False
        output = super().forward(input_ids, *args, **kwargs)  # type: ignore[misc]
        if is_last:
            output.hidden_states = (output.last_hidden_state,)
        return output


def _extend_core(model: Any) -> None:
    core, mixins = model.base_model, ()
    if model.config.model_type in BACKBONES:
        core, mixins = backbone(model).core, backbone(model).core_mixins
    if not isinstance(core, SlotGuard):
        core.__class__ = _extended(type(core), SlotGuard, *mixins)


def _restore_options(model: Any) -> None:
    """Our options in generation_config.json, which transformers drops where that says `_from_model_config`."""
    try:
        file = cached_file(model.name_or_path, GENERATION_CONFIG_NAME, local_files_only=True)
    except (OSError, ValueError):  # it has none, or was never saved
        return
    stored = json.loads(Path(str(file)).read_text())
    for name in stored.keys() & set(OPTIONS):
        setattr(model.generation_config, name, stored[name])


@functools.cache
def _extended(stock: type, *mixins: type) -> type:
    """The subclass with these mixins, under the stock name and module; its instances can be pickled."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _skeleton, (self.config, stock, *mixins), vars(_without_recorders(self))

    body = {"__module__": stock.__module__, "__reduce_ex__": reduce}
    return type(stock.__name__, (*mixins, stock), body)


def _skeleton(config: Any, stock: type, *mixins: type) -> Any:
    """A model without weights, for pickle: by its class's name alone it would find the stock class.

    It is constructed, since transformers learns from `__init__` which states a class can return.
    """
    with torch.device("meta"):
        return _extended(stock, *mixins)(config)


def _without_recorders(module: nn.Module) -> nn.Module:
    """The same module, sharing its weights, without transformers' hooks that record hidden states.

    They are closures, which cannot be pickled; transformers installs them again when it needs them.
    """
    bare = object.__new__(type(module))
    vars(bare).update(vars(module))
    vars(bare).pop("_output_capturing_hooks_installed", None)
    bare._forward_hooks = OrderedDict(
        (key, hook)
        for key, hook in module._forward_hooks.items()
        if hook.__module__ != output_capturing.__name__
    )
    bare._modules = {
        name: child and _without_recorders(child) for name, child in module._modules.items()
    }
    return bare


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
        if compute is not None:
            return compute(self)
        return stock_forward(self, *args, **kw)

    return forward


def _refuse_slots(config: Any, ids: Tensor | None) -> None:
    # A single token is a step of `generate`, which would have to wait for the answer.
    if ids is None or ids.shape[-1] == 1 or torch.compiler.is_compiling():
        return
    pad = getattr(config, "latent_pad_token_id", None)
    if pad is None or getattr(config, "latent_pause", False):
        return
    if bool((ids == pad).any()):
        raise LatentError(
            "these input_ids hold <|latent_pad|>, and a plain forward does not know the states that belong there: "
            "the probabilities of an answer come from storm_vlm.model.rollout; strip old segments from a prompt"
        )
