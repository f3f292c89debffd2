"""Alignment targets: what a slot is to resemble, K vectors a row, from the model's own vision tower.

The paper takes a thought video's tokens; `TargetSource` also has lighter ones, which it leaves to future work, and
controls.

The vision tower is frozen by default, so a target never changes: it is computed once and kept on disk, under a
name that is a hash of all it was made from. Another clip, tower, K or resolution has another name, so nothing
stale is ever read; and a file appears whole or not at all, so any number of workers can share a folder.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.data.collator import VideoInputs
from storm_vlm.data.decode import VideoError
from storm_vlm.data.files import in_one_step
from storm_vlm.data.schema import Row
from storm_vlm.data.video import Clip, read_frames, read_future, read_video
from storm_vlm.latent import TargetNormalization, pool_targets, target_whitening, whiten_targets
from storm_vlm.training.config import FRAMES_PER_SLOT, TargetSource


@dataclass(frozen=True)
class Excerpt:
    """Frames of a file: all of it, what comes `after` so many seconds, or those at certain times."""

    path: str
    after: float | None = None
    times: tuple[float, ...] = ()

    def read(self, num_frames: int) -> Clip:
        """At most `num_frames` frames; each of `times` fills a temporal grid. Raises VideoError."""
        if self.times:
            return read_frames(self.path, [t for t in self.times for _ in range(FRAMES_PER_SLOT)])
        if self.after is not None:
            return read_future(self.path, num_frames, self.after)
        return read_video(self.path, num_frames)


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
    batch_size: int = 16,
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
    pooled: dict[Excerpt, Tensor] = {}
    files: dict[Excerpt, Path] = {}
    recipes: dict[Excerpt, dict[str, Any]] = {}
    if cache is not None:
        recipe = _recipe(model, processor, budget, num_frames)
        for excerpt in tqdm(distinct, "target cache", leave=False):
            path, *part = astuple(excerpt)
            recipes[excerpt] = {"clip": _digest(_chunks(path)), "part": part, **recipe}
            name = _digest([json.dumps(recipes[excerpt], sort_keys=True).encode()])
            files[excerpt] = cache / f"{name}.safetensors"
            if (kept := _read(files[excerpt])) is not None:
                pooled[excerpt] = kept
    missing = [excerpt for excerpt in distinct if excerpt not in pooled]
    videos = VideoInputs(processor, num_frames)
    for first in tqdm(range(0, len(missing), batch_size), "targets", leave=False):
        batch = missing[first : first + batch_size]
        for excerpt, target in zip(batch, _pooled(model, videos, batch, budget), strict=True):
            pooled[excerpt] = target
            if cache is not None:
                _write(files[excerpt], target, recipes[excerpt])
    stacked = torch.stack([pooled[excerpt] for excerpt in wanted if excerpt is not None])
    if normalization == "whiten":
        stacked = whiten_targets(stacked, *target_whitening(stacked))
    each = iter(stacked)
    return [None if excerpt is None else next(each) for excerpt in wanted]


@torch.no_grad()
def _pooled(model: Any, videos: VideoInputs, batch: Sequence[Excerpt], budget: int) -> list[Tensor]:
    inputs = [videos.process(excerpt.read(videos.num_frames)) for excerpt in batch]
    device = model.model.visual.device
    pixels = torch.cat([item["pixel_values_videos"] for item in inputs]).to(device)
    grids = torch.cat([item["video_grid_thw"] for item in inputs]).to(device)
    training = model.training
    features = model.eval().model.get_video_features(pixels, grids).pooler_output
    model.train(training)
    return [pool_targets(tokens, budget).cpu() for tokens in features]


def _recipe(model: Any, processor: Any, budget: int, num_frames: int) -> dict[str, Any]:
    """What a target depends on, but for the clip."""
    tower = model.model.visual
    weights = (
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for _, tensor in sorted(tower.state_dict().items())
    )
    sizes = processor.video_processor.to_dict()
    return {
        "tower": _digest(weights),
        "dtype": str(tower.dtype),
        "pixels": {name: sizes.get(name) for name in ("size", "patch_size", "merge_size")},
        "frames": num_frames,
        "slots": budget,
        "pooling": "adaptive_avg_pool1d",
    }


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:32]


def _chunks(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                yield chunk
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}); build it again") from error


def _read(file: Path) -> Tensor | None:
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("target")
    except (FileNotFoundError, SafetensorError):  # absent, or damaged: made again
        return None


def _write(file: Path, target: Tensor, recipe: dict[str, Any]) -> None:
    try:
        with in_one_step(file) as unfinished:
            save_file({"target": target}, unfinished, metadata={"recipe": json.dumps(recipe)})
    except SafetensorError as error:
        raise OSError(
            f"{file} could not be written ({error}): make room, or set target_cache to a folder that has it"
        ) from error
