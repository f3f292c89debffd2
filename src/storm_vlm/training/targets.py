"""Alignment targets: what a slot is to resemble, K vectors a row, from the model's own vision tower.

The paper takes a thought video's tokens; `TargetSource` also has lighter ones, which it leaves to future work, and
controls. The vision tower is frozen by default, so a target never changes: see `feature_cache.py`. All targets of a
run lie in one file, which its processes map into memory: what a batch does not need is on the disk alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from storm_vlm.data.collator import VideoInputs
from storm_vlm.data.row import Row
from storm_vlm.data.store import key_of
from storm_vlm.errors import AccessError, StormError
from storm_vlm.model.backbones import backbone
from storm_vlm.model.latent import (
    TargetNormalization,
    pool_targets,
    whiten_targets,
    whitening_matrix,
)
from storm_vlm.training.config import Method, TargetSource
from storm_vlm.training.feature_cache import Excerpt, FeatureCache, Tensors, clip_features

CHUNK = 1024  # excerpts that are in memory at a time


class TargetError(StormError, ValueError):
    """Rows that lack what their targets are to be made from."""


class Targets(Dataset[Tensor | None]):
    """A (K, D) float32 target for each row, or None; (k, D) for a row of k slots.

    Args:
        pooled: (M, K, D) float32, one for each distinct excerpt; may be mapped into memory.
        places: for each row the index of its excerpt, or None.
        normalization: with `whiten`, over the rows that have a target.
        slots: (M,) int, how many of an excerpt's K are targets; None: all.
    """

    def __init__(
        self,
        pooled: np.ndarray,
        places: Sequence[int | None],
        normalization: TargetNormalization,
        slots: np.ndarray | None = None,
    ) -> None:
        self._pooled, self._places = pooled, places
        self._slots = np.full(len(pooled), pooled.shape[1]) if slots is None else slots
        self._whitening = None
        if normalization == "whiten":
            used = [place for place in places if place is not None]
            self._whitening = whitening_of(pooled, used, self._slots)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def missing(self) -> int:
        """How many rows lack a target."""
        return self._places.count(None)

    @property
    def complete(self) -> bool:
        return not self.missing

    def __getitem__(self, index: int) -> Tensor | None:
        place = self._places[index]
        if place is None:
            return None
        target = torch.from_numpy(np.array(self._pooled[place, : self._slots[place]]))
        return target if self._whitening is None else whiten_targets(target, *self._whitening)


def whitening_of(
    pooled: np.ndarray, places: Sequence[int], slots: np.ndarray
) -> tuple[Tensor, Tensor]:
    """`target_whitening` of the first `slots` (M,) of pooled[places], with a chunk of it in memory at a time."""
    num_slots, hidden = pooled.shape[1:]
    there = np.arange(num_slots) < slots[:, None]
    weights = torch.from_numpy(np.bincount(places, minlength=len(pooled))[:, None] * there).float()
    chunks = range(0, len(pooled), CHUNK)

    def chunk(first: int) -> tuple[Tensor, Tensor]:
        """(m, K, D), and by how many rows each is wanted (m, K, 1)."""
        part = slice(first, first + CHUNK)
        return torch.from_numpy(np.array(pooled[part])), weights[part, :, None]

    count = float(weights.sum())
    total = torch.zeros(hidden, dtype=torch.float64)
    for first in chunks:
        states, weight = chunk(first)
        total += (states * weight).sum((0, 1))
    mean = (total / count).float()
    covariance = torch.zeros(hidden, hidden, dtype=torch.float64)
    for first in chunks:
        states, weight = chunk(first)
        centred = ((states - mean) * weight.sqrt()).flatten(0, 1)
        covariance += centred.T @ centred
    return mean, whitening_matrix((covariance / count).float())


def excerpts(rows: Sequence[Row], source: TargetSource) -> list[Excerpt | None]:
    """What each row's targets are made from; None where it has nothing of the kind.

    Under `shuffled`, rows exchange their thought videos, always in the same way; of several, none keeps its own.
    """
    found = _excerpts(rows, source)
    return [e and replace(e, slots=row.slots) for e, row in zip(found, rows, strict=True)]


def _excerpts(rows: Sequence[Row], source: TargetSource) -> list[Excerpt | None]:
    if source == "future":
        return [None if row.end is None else Excerpt(row.video, after=row.end) for row in rows]
    if source == "keyframes":
        return [
            Excerpt(row.video, times=tuple(sorted(row.keyframes))) if row.keyframes else None
            for row in rows
        ]
    thoughts = (row.thought_video for row in rows)
    own = [Excerpt(t.path, t.start, t.end) if t else None for t in thoughts]
    if source != "shuffled":
        return own
    places = [place for place, excerpt in enumerate(own) if excerpt is not None]
    random.Random(0).shuffle(places)
    donors = places[1:] + places[:1]  # one round through all of them
    donor_of = dict(zip(places, donors, strict=True))
    return [own[donor_of[place]] if place in donor_of else None for place in range(len(rows))]


def alignment_targets(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    method: Method,
    cache: Path | None = None,
    main_first: AbstractContextManager[Any] = nullcontext(),  # noqa: B008
) -> Targets:
    """One (K, D) float32 target per row, None where a row has nothing of the method's source (paper sec. 3.3).

    A row of its own number of `slots` has as many targets, from as many frames for each.

    Args:
        cache: folder of the files; None keeps all in memory.
        main_first: in it, of several processes the main one is first (`TrainingArguments.main_process_first()`).

    Raises:
        VideoError: a clip cannot be read.
        TargetError: no row has a target.
    """
    budget, source, num_frames = (
        method.latent_budget,
        method.target_source,
        method.num_target_frames,
    )
    wanted = excerpts(rows, source)
    place_of = {e: i for i, e in enumerate(dict.fromkeys(e for e in wanted if e is not None))}
    if not place_of:
        needs = {"future": "an `end` before its video's", "keyframes": "keyframes"}
        raise TargetError(
            f"no row has {needs.get(source, 'a thought video')}, which target_source {source!r} needs: build them "
            "first, or set alignment_weight to 0"
        )

    def pooled(excerpt: Excerpt) -> Tensors:
        slots = excerpt.slots or budget
        videos = VideoInputs(processor, max(1, num_frames * slots // budget))
        tokens = backbone(model).visual_tokens(*clip_features(model, videos, excerpt))
        target = pool_targets(tokens.flatten(0, 2), slots)
        return {"target": F.pad(target, (0, 0, 0, budget - slots))}

    if cache is None:
        array = torch.stack([pooled(excerpt)["target"] for excerpt in place_of]).numpy()
    else:
        rule = {"slots": budget, "pooling": "adaptive_avg_pool1d"}
        files = FeatureCache(cache, "targets", model, processor, num_frames, **rule)
        array = _one_file(files, list(place_of), pooled, main_first)
    places = [None if e is None else place_of[e] for e in wanted]
    slots = np.array([e.slots or budget for e in place_of])
    return Targets(array, places, method.target_normalization, slots)


def _one_file(
    files: FeatureCache,
    excerpts: Sequence[Excerpt],
    compute: Callable[[Excerpt], Tensors],
    main_first: AbstractContextManager[Any],
) -> np.ndarray:
    """The excerpts' targets (M, K, D), mapped into memory; what is missing is computed by all processes together."""
    store, kind = files.store, "target_sets"
    key = key_of(targets=[files.key(excerpt) for excerpt in excerpts])

    def mapped() -> np.ndarray | None:
        return store.read(kind, key, lambda path: np.load(path, mmap_mode="r"), ".npy")

    if mapped() is None:
        files.fill(excerpts, compute)
    with main_first:  # always: processes meet here
        if (found := mapped()) is None:
            with store.place(kind, key, ".npy") as unfinished, open(unfinished, "wb") as file:
                for number, excerpt in enumerate(excerpts):
                    target = (files.read(excerpt) or compute(excerpt))["target"].numpy()
                    if number == 0:
                        shape = (len(excerpts), *target.shape)
                        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(target.astype("<f4").tobytes())
            found = mapped()
    if found is None:
        raise AccessError(f"{store.path(kind, key, '.npy')} cannot be read back: check the disk")
    return found
