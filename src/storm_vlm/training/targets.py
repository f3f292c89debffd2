"""Alignment targets: what a slot is to resemble, K vectors a row, from the model's own vision tower.

The paper takes a thought video's tokens; `TargetSource` also has lighter ones, which it leaves to future work, and
controls. The vision tower is frozen by default, so a target never changes: see `tower.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storm_vlm.data.collator import VideoInputs
from storm_vlm.data.row import Row
from storm_vlm.model.latent import (
    TargetNormalization,
    pool_targets,
    target_whitening,
    whiten_targets,
)
from storm_vlm.training.config import FRAMES_PER_SLOT, TargetSource
from storm_vlm.training.feature_cache import Excerpt, Store, Tensors, made, visual_tokens


def excerpts(rows: Sequence[Row], source: TargetSource) -> list[Excerpt | None]:
    """What each row's targets are made from; None where it has nothing of the kind.

    Under `shuffled`, rows exchange their thought videos, always in the same way; of several, none keeps its own.
    """
    if source == "future":
        return [None if row.end is None else Excerpt(row.video, after=row.end) for row in rows]
    if source == "keyframes":
        return [
            Excerpt(row.video, times=tuple(sorted(row.keyframes))) if row.keyframes else None
            for row in rows
        ]
    found = [Excerpt(row.thought_video.path) if row.thought_video else None for row in rows]
    if source == "shuffled":
        places = [place for place, excerpt in enumerate(found) if excerpt is not None]
        random.Random(0).shuffle(places)
        donors = places[1:] + places[:1]  # one round through all of them
        given = {place: found[donor] for place, donor in zip(places, donors, strict=True)}
        found = [given.get(place) for place in range(len(rows))]
    return found


def alignment_targets(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    budget: int,
    normalization: TargetNormalization,
    source: TargetSource = "thought_video",
    cache: Path | None = None,
    num_frames: int | None = None,
) -> list[Tensor | None]:
    """One (K, D) float32 target per row, None where a row has nothing of that source (paper sec. 3.3).

    Args:
        cache: folder of the files; None keeps nothing.
        num_frames: read from each clip; default two for each slot.

    Raises:
        VideoError: a clip cannot be read.
        ValueError: no row has a target.
    """
    num_frames = num_frames or FRAMES_PER_SLOT * budget
    wanted = excerpts(rows, source)
    distinct = list(dict.fromkeys(excerpt for excerpt in wanted if excerpt is not None))
    if not distinct:
        needs = {"future": "an `end` before its video's", "keyframes": "keyframes"}
        raise ValueError(
            f"no row has {needs.get(source, 'a thought video')}, which target_source {source!r} needs: build them "
            "first, or set alignment_weight to 0"
        )
    videos = VideoInputs(processor, num_frames)
    store = None
    if cache is not None:
        rule = {"slots": budget, "pooling": "adaptive_avg_pool1d"}
        store = Store(cache, model, processor, num_frames, **rule)

    def pooled(excerpt: Excerpt) -> Tensors:
        return {"target": pool_targets(visual_tokens(model, videos, excerpt)[0], budget)}

    found = {e: tensors["target"] for e, tensors in made(distinct, pooled, store, "targets")}
    stacked = torch.stack([found[excerpt] for excerpt in wanted if excerpt is not None])
    if normalization == "whiten":
        stacked = whiten_targets(stacked, *target_whitening(stacked))
    each = iter(stacked)
    return [None if excerpt is None else next(each) for excerpt in wanted]
