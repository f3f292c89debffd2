"""The card of a trained checkpoint: every stage of its training, back to the model it began with."""

from __future__ import annotations

from pathlib import Path

import yaml

from storm_vlm.data.atomic_write import write_text
from storm_vlm.errors import InputError
from storm_vlm.model.model_card import CARD, model_card
from storm_vlm.training.config import TrainConfig, load_config

OF_THIS_MACHINE = {"model", "data", "output_dir", "target_cache", "vision_cache"}


def write_card(checkpoint: Path, results: str = "") -> Path:
    """Write the checkpoint's `README.md`; `results` are Markdown. Returns the file.

    Raises:
        InputError: there is no checkpoint.
    """
    if not (checkpoint / "config.json").exists():
        raise InputError(f"{checkpoint} holds no config.json: name a checkpoint's folder")
    base, stages = lineage(checkpoint)
    card = model_card(checkpoint, base, [stage(config) for config in stages], results)
    write_text(checkpoint / CARD, card)
    return checkpoint / CARD


def lineage(checkpoint: Path) -> tuple[str, list[TrainConfig]]:
    """What a checkpoint's first stage began with ("" where that is not known), and its stages in order."""
    stages: list[TrainConfig] = []
    known = checkpoint / "train_config.yaml"
    while known.exists():
        stages.insert(0, load_config(known))
        known = Path(stages[0].model).expanduser() / known.name
        if len(stages) > 1 and stages[0] in stages[1:]:
            break
    return (stages[0].model if stages else ""), stages


def stage(config: TrainConfig) -> tuple[str, str]:
    """A title, and every setting that is not a default, but for the places of files."""
    settings = config.model_dump(mode="json", exclude=OF_THIS_MACHINE, exclude_defaults=True)
    return f"`{Path(config.output_dir).name}`, on `{Path(config.data).name}`", yaml.safe_dump(
        settings
    )
