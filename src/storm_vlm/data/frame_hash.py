"""A perceptual hash of frames: where brightness rises, to the right and downwards, on a grid of 16 x 16."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GRID = 16
BITS = 2 * GRID * GRID
MARGIN = 3.0  # grey levels; what an encoder adds to a flat area is less


def frame_hashes(frames: np.ndarray) -> np.ndarray:
    """Hashes uint8 (T, 64) of frames uint8 (T, H, W, 3), 512 bits each; without any structure, all are 0."""
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    small = _pooled(_pooled(grey, 1), 2)
    right = np.diff(small, axis=2)[:, :GRID] > MARGIN
    down = np.diff(small, axis=1)[:, :, :GRID] > MARGIN
    return np.packbits(np.stack([right, down], axis=1).reshape(-1, BITS), axis=1)


def _pooled(grey: np.ndarray, axis: int) -> np.ndarray:
    """Means over GRID + 1 parts of an axis, which may share a row of pixels."""
    size, parts = grey.shape[axis], GRID + 1
    ends = [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]
    return np.stack([grey.take(range(*part), axis).mean(axis) for part in ends], axis)


def image_hash(path: Path) -> np.ndarray:
    """Hash uint8 (1, 64) of an image file."""
    from PIL import Image

    with Image.open(path) as image:
        return frame_hashes(np.asarray(image.convert("RGB"))[None])


def distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(M, bytes), (N, bytes) -> (M, N): share of set bits that only one has, from 0 (the same) to 1 (none shared).

    Relative to what there is to see: two dark frames are not alike for being dark, and a frame without structure is
    like none.
    """
    a, b = (np.unpackbits(hashes, axis=1).astype(np.float32) for hashes in (ours, theirs))
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)
    either -= both  # in place: these are the large ones
    np.maximum(either, 1, out=either)
    np.divide(both, either, out=both)
    return np.subtract(1, both, out=both)
