"""A base checkpoint becomes one with latent tokens, without any training."""

from __future__ import annotations

from pathlib import Path

from storm_vlm.data.output import exclusive, refuse_input
from storm_vlm.errors import InputError
from storm_vlm.model.checkpoint import checkpoint_path, load_processor
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.tokens import add_latent_tokens
from storm_vlm.training.checkpoints import all_or_nothing

SHARD = "5GB"  # of a base on the hub


def initial_checkpoint(
    base: str,
    out: Path,
    latent_budget: int = 8,
    num_frames: int | None = None,
    max_shard_size: str | int | None = None,
) -> Path:
    """Add the latent tokens to model and processor, record K and the number of frames, and save both.

    Args:
        base: folder or hub name.
        out: a new folder, or one without a model.
        max_shard_size: as in transformers; None: as large as the largest file of `base`.

    Raises:
        InputError: `out` is `base`, or holds a model.
        CheckpointError: `base` is no checkpoint.
        LatentError: the budget is less than 1.
    """
    base = checkpoint_path(base)
    refuse_input(out, [base])
    if list(out.glob("*.safetensors")):
        raise InputError(f"{out} holds a model, which would be overwritten: choose another folder")
    if latent_budget < 1:
        raise InputError(f"a latent budget of {latent_budget} is none: take 1 or more")
    with exclusive(out), all_or_nothing(out) as folder:
        processor = load_processor(base)
        model = StormForConditionalGeneration.from_pretrained(base)
        add_latent_tokens(model, processor, latent_budget)
        if num_frames:
            model.config.num_frames = num_frames
        shards = [file.stat().st_size for file in Path(base).glob("*.safetensors")]
        model.save_pretrained(
            folder, max_shard_size=max_shard_size or max(shards, default=0) or SHARD
        )
        processor.save_pretrained(folder)
    return out
