"""Fields of transformers' TrainingArguments: defaults that this data needs, and what would fail or be ignored."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    get_reporting_integration_callbacks,
    is_tensorboard_available,
)

from storm_vlm.training.config import ConfigError, TrainConfig

# Fields of TrainingArguments that transformers 5.24 renamed.
RENAMED = {
    f"gradient_checkpointing{suffix}": f"activation_checkpointing{suffix}"
    for suffix in ("", "_kwargs")
}
ARBITRARY = ConfigDict(arbitrary_types_allowed=True)
# Numbers of TrainingArguments, which checks none: what is not here goes from 0 to the largest.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "max_steps",  # or -1: as many as the epochs have
            "gradient_accumulation_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "save_total_limit",
            "dataloader_prefetch_factor",
            "torch_empty_cache_steps",
        ),
        (1, sys.maxsize),
    ),
    **dict.fromkeys(
        ("save_steps", "eval_steps", "logging_steps"), (1e-9, sys.maxsize)
    ),  # below 1: a share
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1 - 1e-9)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "local_rank": (-1, sys.maxsize),
}
SAMPLING = ("random", "sequential", "group_by_length")
# Fields of TrainingArguments that would be ignored, or fail.
REFUSED = {
    "resume_from_checkpoint": "a run goes on by itself, from the last whole checkpoint of its own output_dir; to "
    "begin with another run's weights, set model",
    "label_smoothing_factor": "the losses are the paper's, which are not smoothed: leave it out",
    "average_tokens_across_devices": "a step's loss is always that of all its rows: leave it out",
    "torch_compile": "a rollout of several passes cannot be compiled: leave it out",
}


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments with the defaults that this data needs; the config's own values win.

    Curves go to TensorBoard if it is installed.
    """
    arguments: dict[str, Any] = {
        "output_dir": config.output_dir,
        "remove_unused_columns": False,  # the collator takes rows, not columns
        "save_total_limit": 2,
        "report_to": "tensorboard" if is_tensorboard_available() else "none",
        "logging_steps": 10,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **_typed(config.training),
    }
    try:
        checked = TrainingArguments(**arguments)
    except Exception as error:  # of many kinds: it also reads files and looks for packages
        raise ConfigError(f"training: {type(error).__name__}: {error}") from error
    _refuse_vain(checked, config.training)
    if "tensorboard" in (checked.report_to or ()) and not is_tensorboard_available():
        raise ConfigError("training.report_to: pip install tensorboard, or choose another")
    try:
        for callback in get_reporting_integration_callbacks(checked.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:  # unknown, or its package is missing
        raise ConfigError(f"training.report_to: {error}") from error
    return checked


def _refuse_vain(checked: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raises ConfigError for fields that would be passed over in silence."""
    if checked.max_steps < 0 and checked.num_train_epochs <= 0:
        raise ConfigError("training: there is no step to take: set max_steps, or num_train_epochs")
    if checked.train_sampling_strategy not in SAMPLING:
        raise ConfigError(
            f"training.train_sampling_strategy: {checked.train_sampling_strategy!r} is none of {', '.join(SAMPLING)}"
        )
    if checked.load_best_model_at_end and checked.eval_strategy == "no":
        raise ConfigError(
            "training.load_best_model_at_end does nothing without an evaluation: set training.eval_strategy, too"
        )
    if checked.max_steps > 0 and "num_train_epochs" in given:
        raise ConfigError(
            "training.num_train_epochs would be ignored beside training.max_steps: leave one out (max_steps=-1)"
        )
    if checked.fp16 and checked.device.type == "cpu":
        raise ConfigError("training.fp16 needs a GPU: leave it out, or set training.bf16")
    for name, reason in REFUSED.items():
        if getattr(checked, name) != TrainingArguments.__dataclass_fields__[name].default:
            raise ConfigError(f"training.{name}: {reason}")


def _typed(training: dict[str, Any]) -> dict[str, Any]:
    """Values of the types that TrainingArguments declares and does not check. Raises ConfigError."""
    hints = get_type_hints(TrainingArguments)
    renamed = {old: new for old, new in RENAMED.items() if new in hints}
    values = {renamed.get(name, name): value for name, value in training.items()}
    for name in values.keys() & hints.keys():
        try:
            values[name] = TypeAdapter(hints[name], config=ARBITRARY).validate_python(values[name])
        except ValidationError as error:
            problem = f"{values[name]!r}: {error.errors()[0]['msg']}"
            raise ConfigError(f"training.{name}: {problem}") from error
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low, high = RANGES.get(name, (0, sys.float_info.max))
        if not low <= value <= high and (name, value) != ("max_steps", -1):
            raise ConfigError(f"training.{name}: {value} is not from {low:g} to {high:g}")
    return values
