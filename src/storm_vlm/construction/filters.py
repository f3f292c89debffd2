"""Is a thought video fit to be learned from? Each filter is a function from frames to a score.

Frames are uint8 (T, H, W, 3). Scores lie between 0 and 1, or little above; the one of `visual_gain.py` between -1
and 1. `LOW_IS_BAD` names those that a row must reach; the others must not be exceeded. Thresholds are in
`FilterConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from storm_vlm.data.frame_hash import BITS, distances, frame_hashes

if TYPE_CHECKING:
    import torch

LOW_IS_BAD = frozenset({"blank", "frozen", "duplicate", "visual_gain"})
PRINTED = 5  # frames of a video that its fingerprint looks at
HASHED = BITS // 8  # bytes of a frame's hash
BLOCKS = 32  # of a picture's side
RULES = 2  # changes with what scores mean: stored ones of another number are made again


def blank(frames: np.ndarray) -> float:
    """Contrast of the emptiest frame: the standard deviation of its grey levels."""
    return float(_grey(frames).std(axis=(1, 2)).min())


def frozen(frames: np.ndarray) -> float:
    """How far any of 32 x 32 blocks gets from its colour in the first frame; a thin line on white moves, too."""
    size, scale = (BLOCKS, BLOCKS), Image.Resampling.BOX
    small = [np.asarray(Image.fromarray(f).resize(size, scale), np.float32) for f in frames]
    return float(max(np.abs(blocks - small[0]).max() for blocks in small) / 255)


def flicker(frames: np.ndarray) -> float:
    """How the brightness of the whole picture jumps about: mean absolute second difference in time."""
    light = _grey(frames).mean(axis=(1, 2))
    return float(np.abs(np.diff(light, 2)).mean()) if len(light) > 2 else 0.0


def mismatch(frames: np.ndarray, keyframe: np.ndarray) -> float:
    """Mean absolute difference of the first frame to the keyframe (H', W', 3) it should start from, both small."""
    small = [
        np.asarray(Image.fromarray(frame).resize((32, 32), Image.Resampling.BOX), np.float32) / 255
        for frame in (frames[0], keyframe)
    ]
    return float(np.abs(small[0] - small[1]).mean())


def fingerprint(frames: np.ndarray) -> str:
    """The hashes of five frames, in hexadecimal."""
    return frame_hashes(frames[_spread(frames, PRINTED)]).tobytes().hex()


class Duplicates:
    """Fingerprints of thought videos, and how near one of another clip comes to them.

    Two questions about one clip may well have the same: such prints are not compared. Nor are those that share no
    band of MinHashes, so that a look takes hardly longer the more there are. Of two prints closer than `limit`, one
    in 10^6 shares none. A print takes some 460 bytes.
    """

    BANDS = 32
    BUCKETS = 1 << 17  # of a band

    def __init__(self, limit: float) -> None:
        # Two prints agree in a permutation as often as they share bits, which is 1 - distance.
        rows = max(1, int(math.log(0.35) / math.log1p(-min(max(limit, 0.02), 0.9))))
        random, bits = np.random.default_rng(0), 8 * PRINTED * HASHED
        ranks = random.random((bits, self.BANDS * rows), np.float32).argsort(0)
        self._ranks = ranks.astype(np.uint16)
        self._factors = random.integers(1 << 63, size=rows, dtype=np.uint64) * 2 + 1
        fields = [
            ("print", np.uint8, PRINTED * HASHED),
            ("clip", np.int64),
            ("before", np.int32, self.BANDS),  # in the same bucket, by band; -1: none
        ]
        self._kept = np.zeros(1024, fields)
        self._count = 0
        self._last = np.full((self.BANDS, self.BUCKETS), -1, np.int32)  # of each bucket

    def nearest(self, fingerprint: str, clip: Hashable) -> float:
        """The distance (see `frame_hash.py`) to the nearest that may be a duplicate; 1 without any."""
        mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
        near = self._near(self._buckets(mine))
        others = near[near["clip"] != hash(clip)]
        return float(distances(mine[None], others["print"]).min()) if len(others) else 1.0

    def add(self, fingerprint: str, clip: Hashable) -> None:
        """Keep a print, unless it is without structure, or the clip's already."""
        mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
        buckets = self._buckets(mine)
        near = self._near(buckets)
        if (
            not len(buckets)
            or ((near["clip"] == hash(clip)) & (near["print"] == mine).all(1)).any()
        ):
            return
        if self._count == len(self._kept):
            self._kept = np.concatenate([self._kept, np.zeros_like(self._kept)])
        places = np.arange(self.BANDS), buckets
        self._kept[self._count] = mine, hash(clip), self._last[places]
        self._last[places] = self._count
        self._count += 1

    def _near(self, buckets: np.ndarray) -> np.ndarray:
        """What is kept in any of the buckets, of each band one."""
        bands = np.arange(len(buckets))
        places, found = self._last[bands, buckets], [np.empty(0, np.int32)]
        while len(places):
            bands, places = bands[places >= 0], places[places >= 0]
            found.append(places)
            places = self._kept["before"][places, bands]
        return self._kept[np.unique(np.concatenate(found))]

    def _buckets(self, mine: np.ndarray) -> np.ndarray:
        """For each band, where its MinHashes lead to; none for a print without structure, which is like none."""
        bits = np.unpackbits(mine).nonzero()[0]
        if not len(bits):
            return np.empty(0, np.int64)
        first = self._ranks[bits].min(0).reshape(self.BANDS, -1)
        return ((first * self._factors).sum(1) >> np.uint64(32)).astype(np.int64) % self.BUCKETS


def off_topic(model: str) -> Callable[[np.ndarray, str], float]:
    """(frames, text) -> 1 minus the cosine of the text and the mean of four frames, by a CLIP or SigLIP model."""
    import torch
    from transformers import AutoModel, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(model)
    embedder: Any = AutoModel.from_pretrained(model).eval()

    @torch.inference_mode()
    def score(frames: np.ndarray, text: str) -> float:
        pictures = [Image.fromarray(frame) for frame in frames[_spread(frames, 4)]]
        images = processor(images=pictures, return_tensors="pt")
        words = processor(text=[text], padding="max_length", truncation=True, return_tensors="pt")
        seen = _pooled(embedder.get_image_features(**images)).mean(dim=0)
        said = _pooled(embedder.get_text_features(**words))[0]
        return 1 - float(torch.cosine_similarity(seen, said, dim=0))

    return score


def _pooled(features: Any) -> torch.Tensor:
    pooled = features if hasattr(features, "norm") else features.pooler_output
    return pooled / pooled.norm(dim=-1, keepdim=True)


def _spread(frames: np.ndarray, count: int) -> np.ndarray:
    return np.linspace(0, len(frames) - 1, count).round().astype(int)


def _grey(frames: np.ndarray) -> np.ndarray:
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
