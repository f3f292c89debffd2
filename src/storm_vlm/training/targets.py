"""Alignment targets: each thought video through the model's own vision tower, pooled to K vectors.

The vision tower is frozen by default, so a target never changes and is computed once, before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.data.collator import VideoInputs
from storm_vlm.data.schema import Row
from storm_vlm.latent import TargetNormalization, normalize_targets, pool_targets, target_statistics

THOUGHT_FRAMES_PER_SLOT = 2  # one temporal grid of Qwen2.5-VL


@torch.no_grad()
def thought_targets(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    budget: int,
    normalization: TargetNormalization,
    batch_size: int = 16,
) -> list[Tensor | None]:
    """One (K, D) float32 target per row, None where a row has no thought video (paper sec. 3.3).

    Raises:
        VideoError: a thought video cannot be read.
        ValueError: no row has a thought video.
    """
    with_video = [(i, row.thought_video) for i, row in enumerate(rows) if row.thought_video]
    if not with_video:
        raise ValueError(
            "no row has a thought video: build them first, or set alignment_weight to 0"
        )
    videos = VideoInputs(processor, THOUGHT_FRAMES_PER_SLOT * budget)
    pooled: list[Tensor] = []
    model.eval()
    for first in tqdm(range(0, len(with_video), batch_size), "thought-video targets", leave=False):
        inputs = [videos.get(thought.path) for _, thought in with_video[first : first + batch_size]]
        pixels = torch.cat([item["pixel_values_videos"] for item in inputs]).to(model.device)
        grids = torch.cat([item["video_grid_thw"] for item in inputs]).to(model.device)
        features = model.model.get_video_features(pixels, grids).pooler_output
        pooled += [pool_targets(tokens, budget).cpu() for tokens in features]
    stacked = torch.stack(pooled)
    stacked = normalize_targets(stacked, normalization, *target_statistics(stacked))
    targets: list[Tensor | None] = [None] * len(rows)
    for (i, _), target in zip(with_video, stacked, strict=True):
        targets[i] = target
    return targets
