"""Muon for matrices and NAdamW for all else, in one optimizer (timm's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from storm_vlm.training.config import ConfigError

# Tables of vectors, each of which moves by itself.
NOT_MATRICES = ("embed_tokens", "lm_head", "pos_embed")


def muon_and_nadamw(
    model: Any, arguments: TrainingArguments, settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Muon with `settings`; a matrix's step is scaled to be as long as AdamW's, so that `lr` means the same to both.

    Learning rate, weight decay and betas are what `arguments` say, where `settings` do not.

    Raises:
        ConfigError: timm is not installed, or its Muon does not know a setting, or refuses it.
    """
    try:
        from timm.optim.muon import Muon
    except ImportError as error:
        raise ConfigError(
            "muon needs timm: pip install timm, or leave muon out of the config"
        ) from error

    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim > 2 or any(table in name for table in NOT_MATRICES):
            tables.append(parameter)
        else:
            matrices.append(parameter)
    by_nadamw = {"lr": arguments.learning_rate, "use_fallback": True}
    groups = [
        # Whatever their shape: timm would leave thin ones, such as adapters, to NAdamW.
        {"params": matrices, "use_muon": True},
        {"params": tables, **by_nadamw},
        {"params": vectors, **by_nadamw, "weight_decay": 0.0},
    ]
    defaults = {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "nesterov": True,
    }
    try:
        return Muon([group for group in groups if group["params"]], **{**defaults, **settings})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"muon: {error}") from error
