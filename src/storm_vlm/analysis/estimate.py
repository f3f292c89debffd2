"""A mean with its 95% interval over videos, as every file of an analysis writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from storm_vlm.evaluation.statistics import confidence_interval


def estimate(values: ArrayLike, videos: Sequence[str]) -> dict[str, Any]:
    """`mean`, `low`, `high` and `n` of one value (a share, a distance) per row."""
    found = np.asarray(values, float)
    if len(found) != len(videos):
        raise ValueError(f"{len(found)} values for {len(videos)} rows")
    if not len(found):
        return {"mean": None, "low": None, "high": None, "n": 0}
    low, high = confidence_interval(found.tolist(), list(videos))
    return {"mean": float(found.mean()), "low": low, "high": high, "n": len(found)}
