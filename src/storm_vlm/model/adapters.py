"""LoRA adapters on a model with latent tokens: what of its tables they train, and how they are merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from storm_vlm.model.checkpoint import CheckpointError
from storm_vlm.model.tokens import SETTINGS, check_settings, latent_tokens


def token_rows(model: Any, except_in: Sequence[str] = ()) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the latent tokens' rows of every table."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tables[0].weight is tables[1].weight:
        tables.pop()
    names = [name for name, module in model.named_modules() if module in tables]
    names = [name for name in names if not name.endswith(tuple(except_in))]
    return {name: list(latent_tokens(model.config)) for name in names}


def _unsaved_tables(base: Any, adapters: Any) -> list[str]:
    """Of the base's tables with rows of latent tokens, those that the adapters say nothing of."""
    indices = getattr(adapters, "trainable_token_indices", None) or {}
    saved = indices if isinstance(indices, dict) else ["embed_tokens"]  # PEFT's meaning of a list
    saved = [*saved, *(getattr(adapters, "modules_to_save", None) or ())]
    return [table for table in token_rows(base) if not table.endswith(tuple(saved))]


def adapted_config(folder: Path) -> PreTrainedConfig | None:
    """The config of the model that the adapters were trained in, if it was saved with them."""
    return AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None


def merge_adapters(base: Any, folder: Path) -> Any:
    """`base` as it was in training: with as many rows, its latent tokens, and the adapters added to its weights.

    Raises:
        CheckpointError: the adapters are damaged, incomplete, or of another model.
    """
    from peft import PeftConfig, PeftModel

    config = adapted_config(folder) or base.config
    rows = config.get_text_config().vocab_size
    if rows > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    brings_tokens = hasattr(config, SETTINGS[0]) and not hasattr(base.config, SETTINGS[0])
    for name in SETTINGS:
        if hasattr(config, name):
            setattr(base.config, name, getattr(config, name))
    check_settings(base.config)
    try:
        adapters = PeftConfig.from_pretrained(str(folder))
        if getattr(adapters, "trainable_token_indices", None) and not hasattr(config, SETTINGS[0]):
            raise CheckpointError(
                f"{folder} trains tokens that {base.name_or_path} does not know: copy the config.json and the "
                "tokenizer of the model that it was trained in into it"
            )
        if brings_tokens and (lost := _unsaved_tables(base, adapters)):
            raise CheckpointError(
                f"{folder} lacks the latent tokens' rows of {', '.join(lost)}, as what storm-vlm saved before it "
                "kept them: train these adapters again"
            )
        model = PeftModel(base, adapters)
        report = model.load_adapter(str(folder), "default")
    except CheckpointError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the adapters of {folder} cannot be put on {base.name_or_path}: {error!r}"
        ) from error
    if wrong := [*report.missing_keys, *report.unexpected_keys]:
        raise CheckpointError(
            f"the adapters of {folder} do not fit {base.name_or_path} ({len(wrong)} tensors, as {wrong[0]})"
        )
    return model.merge_and_unload()
