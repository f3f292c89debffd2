"""A training run of the micro world: a shipped YAML file, and what is different in this run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storm_vlm.training.config import TrainConfig, load_config

MICRO_CONFIGS = Path(__file__).parent / "configs"


def micro_config(
    name: str, overrides: Sequence[str] = (), rows: Path | None = None, **training: Any
) -> TrainConfig:
    """The shipped config `name` with `overrides` (`key=value`) and fields of `training`.

    With `rows`, it reads these, and keeps targets and visual features beside them.
    """
    config = load_config(MICRO_CONFIGS / f"{name}.yaml", list(overrides))
    fields: dict[str, Any] = {"training": {**config.training, **training}}
    if rows is not None:
        caches = {
            "target_cache": rows.parent / "targets",
            "vision_cache": rows.parent / "features",
        }
        fields |= {key: str(path) for key, path in {"data": rows, **caches}.items()}
    return config.model_copy(update=fields)
