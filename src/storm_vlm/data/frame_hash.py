"""A perceptual hash of frames: where brightness rises, to the right and downwards, on a grid of 16 x 16.

It does not see what is smaller than a cell: two puzzles whose numbers differ have the same. `pictures` and `agree`
tell these apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

GRID = 16
BITS = 2 * GRID * GRID
MARGIN = 3.0  # grey levels; what an encoder adds to a flat area is less
CELLS = 32  # of a picture's side
MOVED, DIFFERENT = 8.0, 14.0  # grey levels of a cell
FEW = 9  # cells that differ; scaling and encoding do so to fewer, at the sharpest edges


def frame_hashes(frames: np.ndarray) -> np.ndarray:
    """Hashes uint8 (T, 64) of frames uint8 (T, H, W, 3), 512 bits each; without any structure, all are 0."""
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    small = _pooled(_pooled(grey, 1, GRID + 1), 2, GRID + 1)
    right = np.diff(small, axis=2)[:, :GRID] > MARGIN
    down = np.diff(small, axis=1)[:, :, :GRID] > MARGIN
    return np.packbits(np.stack([right, down], axis=1).reshape(-1, BITS), axis=1)


def pictures(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small pictures float32 (T, 32, 32, 3) of frames, and bool (T, 32, 32): which cells are still.

    A cell is still where neither the frame before nor the one after differs.
    """
    small = _pooled(_pooled(frames.astype(np.float32), 1, CELLS), 2, CELLS)
    moved = (np.abs(np.diff(small, axis=0)) > MOVED).any(-1)
    still = np.ones(small.shape[:3], bool)
    still[1:] &= ~moved
    still[:-1] &= ~moved
    for axis in (1, 2):  # slightly blurred: scaling shifts edges by part of a cell
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        wide = np.pad(small, pad, mode="edge")
        before, middle, after = (wide.take(range(i, i + CELLS), axis) for i in range(3))
        small = (before + 2 * middle + after) / 4
    return np.ascontiguousarray(small), still


def agree(ours: np.ndarray, theirs: np.ndarray, still: np.ndarray) -> bool:
    """Whether two pictures (32, 32, 3) show the same where both stand still, but for brightness and contrast."""
    if still.mean() < 0.1:
        return True  # a moving camera: nothing to tell them apart by
    a, b = (picture[still] - picture[still].mean(0) for picture in (ours, theirs))
    contrast = (a * b).sum() / max((a * a).sum(), 1.0)
    return int((np.abs(contrast * a - b).max(-1) > DIFFERENT).sum()) < FEW


def _pooled(values: np.ndarray, axis: int, parts: int) -> np.ndarray:
    """Means over parts of an axis, which may share a row of pixels."""
    size = values.shape[axis]
    ends = [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]
    return np.stack([values.take(range(*part), axis).mean(axis) for part in ends], axis)


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
