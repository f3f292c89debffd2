"""The three special tokens of the latent segment, and where their ids and the slot budget are kept.

Ids and budget live in the model's config, so that a checkpoint carries all that inference needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AddedToken

from storm_vlm.errors import StormError
from storm_vlm.model.checkpoint import CheckpointError

LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
_CONFIG_NAMES = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
# What our checkpoints keep in a stock config.
SETTINGS = (*_CONFIG_NAMES, "latent_budget", "latent_pause", "latent_bottleneck", "num_frames")


class LatentError(StormError, ValueError):
    """A checkpoint, prompt or option that latent reasoning cannot work with."""


class LatentTokens(NamedTuple):
    """Token ids of the latent segment ``start pad*K end``."""

    start: int
    pad: int
    end: int


def has_latent_tokens(config: Any) -> bool:
    """Whether this config's model has met `add_latent_tokens`."""
    return getattr(config, _CONFIG_NAMES[0], None) is not None


def latent_tokens(config: Any) -> LatentTokens:
    """Read the ids from a model config.

    Raises:
        LatentError: the config has none, i.e. the model has never met `add_latent_tokens`.
    """
    ids = [getattr(config, name, None) for name in _CONFIG_NAMES]
    if any(i is None for i in ids):
        raise LatentError(
            "this model's config has no latent token ids: call add_latent_tokens(model, processor)"
        )
    return LatentTokens(*ids)  # type: ignore[arg-type]


def check_settings(config: Any) -> None:
    """Raises CheckpointError for `SETTINGS` that no training could have written."""
    text = config.get_text_config()
    known = [name for name in SETTINGS if getattr(config, name, None) is not None]
    needed = [*_CONFIG_NAMES, "latent_budget"] if set(_CONFIG_NAMES) & set(known) else []
    most = getattr(text, "max_position_embeddings", None) or float("inf")
    ranges = {
        **dict.fromkeys([*_CONFIG_NAMES, "latent_bottleneck"], (0, text.vocab_size - 1)),
        "latent_budget": (0, most),
        "num_frames": (1, float("inf")),
        "latent_pause": (False, True),
    }
    for name in dict.fromkeys([*needed, *known]):
        value, (low, high) = getattr(config, name, None), ranges[name]
        if type(value) is not type(low) or not low <= value <= high:
            raise CheckpointError(
                f"config.json of {config.name_or_path or 'this model'}: {name} is {value!r}, not from {low} to "
                f"{high}: copy the file again from where the model was trained"
            )


def check_tokenizer(config: Any, processor: Any) -> None:
    """Raises CheckpointError where config and tokenizer have other ids for the latent tokens."""
    ids = getattr(processor, "tokenizer", processor).convert_tokens_to_ids(list(LATENT_TOKENS))
    known = [getattr(config, name, None) for name in _CONFIG_NAMES]
    if known != ids:
        raise CheckpointError(
            f"{config.name_or_path or 'this model'}: config.json has the latent tokens' ids {known}, the tokenizer "
            f"{ids}: copy both again from where the model was trained"
        )


def add_latent_tokens(model: Any, processor: Any, budget: int = 8, seed: int = 0) -> LatentTokens:
    """Teach model and processor the latent tokens; calling it again only sets the budget.

    Qwen2.5-VL's embedding table has spare rows beyond the tokenizer, so it normally keeps its size; it never shrinks.
    The three rows (spare rows are untrained) start at the mean of the trained rows plus a small distinct noise, in
    the input embedding and in the output layer.

    Args:
        model: a causal model with a ``config``; changed in place.
        processor: its processor (or tokenizer); changed in place. Save both.
        budget: K, the most latent slots of a segment (8 in the paper); 0 switches latent reasoning off.
        seed: of the noise; the global random state is left alone.

    Raises:
        LatentError: negative budget, or a config whose ids contradict the tokenizer.
    """
    if budget < 0:
        raise LatentError(f"the latent budget must be 0 or more, got {budget}")
    tokenizer = getattr(processor, "tokenizer", processor)
    added = [AddedToken(name, special=True, normalized=False) for name in LATENT_TOKENS]
    tokenizer.add_tokens(added, special_tokens=True)  # known tokens are skipped
    ids = LatentTokens(*tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS)))
    known = [getattr(model.config, name, None) for name in _CONFIG_NAMES]
    if known != list(ids):
        if any(i is not None for i in known):
            raise LatentError(
                f"config says latent ids {known}, tokenizer says {list(ids)}: load a matching pair"
            )
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _initialize_rows(model, ids, seed)
    for name, token_id in zip(_CONFIG_NAMES, ids, strict=True):
        setattr(model.config, name, token_id)
    model.config.latent_budget = budget
    return ids


@torch.no_grad()
def _initialize_rows(model: Any, ids: LatentTokens, seed: int) -> None:
    tables: list[Tensor] = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tables[0]:
        tables.append(output.weight)
    generator = torch.Generator().manual_seed(seed)
    for table in tables:
        trained = table[: min(ids)]  # special tokens come last
        mean = trained.mean(0, dtype=torch.float32)
        sample = trained[:: max(1, len(trained) // 4096)]  # no float32 copy of the whole table
        scale = 0.1 * sample.float().std()
        noise = torch.randn(len(ids), table.shape[1], generator=generator).to(mean)
        table[list(ids)] = (mean + scale * noise).to(table)
