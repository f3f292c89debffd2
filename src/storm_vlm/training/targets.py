"""Alignment targets: each thought video through the model's own vision tower, pooled to K vectors.

The vision tower is frozen by default, so a target never changes: it is computed once and kept on disk, under a
name that is a hash of all it was made from. Another clip, tower, K or resolution has another name, so nothing
stale is ever read; and a file appears whole or not at all, so any number of workers can share a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
from storm_vlm.latent import TargetNormalization, pool_targets, target_whitening, whiten_targets

THOUGHT_FRAMES_PER_SLOT = 2  # one temporal grid of Qwen2.5-VL


def thought_targets(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    budget: int,
    normalization: TargetNormalization,
    cache: Path | None = None,
    batch_size: int = 16,
) -> list[Tensor | None]:
    """One (K, D) float32 target per row, None where a row has no thought video (paper sec. 3.3).

    Args:
        cache: folder of the files; None keeps nothing.

    Raises:
        VideoError: a thought video cannot be read.
        ValueError: no row has a thought video.
    """
    paths = [row.thought_video.path if row.thought_video else None for row in rows]
    distinct = list(dict.fromkeys(path for path in paths if path is not None))
    if not distinct:
        raise ValueError(
            "no row has a thought video: build them first, or set alignment_weight to 0"
        )
    pooled: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    recipes: dict[str, dict[str, Any]] = {}
    if cache is not None:
        recipe = _recipe(model, processor, budget)
        for path in distinct:
            recipes[path] = {"clip": _digest(_chunks(path)), **recipe}
            name = _digest([json.dumps(recipes[path], sort_keys=True).encode()])
            files[path] = cache / f"{name}.safetensors"
            if (kept := _read(files[path])) is not None:
                pooled[path] = kept
    missing = [path for path in distinct if path not in pooled]
    videos = VideoInputs(processor, THOUGHT_FRAMES_PER_SLOT * budget)
    for first in tqdm(range(0, len(missing), batch_size), "thought-video targets", leave=False):
        batch = missing[first : first + batch_size]
        for path, target in zip(batch, _pooled(model, videos, batch, budget), strict=True):
            pooled[path] = target
            if cache is not None:
                _write(files[path], target, recipes[path])
    stacked = torch.stack([pooled[path] for path in paths if path is not None])
    if normalization == "whiten":
        stacked = whiten_targets(stacked, *target_whitening(stacked))
    each = iter(stacked)
    return [None if path is None else next(each) for path in paths]


@torch.no_grad()
def _pooled(model: Any, videos: VideoInputs, paths: Sequence[str], budget: int) -> list[Tensor]:
    inputs = [videos.get(path) for path in paths]
    pixels = torch.cat([item["pixel_values_videos"] for item in inputs]).to(model.device)
    grids = torch.cat([item["video_grid_thw"] for item in inputs]).to(model.device)
    training = model.training
    features = model.eval().model.get_video_features(pixels, grids).pooler_output
    model.train(training)
    return [pool_targets(tokens, budget).cpu() for tokens in features]


def _recipe(model: Any, processor: Any, budget: int) -> dict[str, Any]:
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
        "frames": THOUGHT_FRAMES_PER_SLOT * budget,
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
    file.parent.mkdir(parents=True, exist_ok=True)
    with in_one_step(file) as unfinished:
        save_file({"target": target}, unfinished, metadata={"recipe": json.dumps(recipe)})
