"""Batches of rows that are about equally long, so that little of a batch is padding (`group_by_length`).

A row's length is mostly its video's share, which follows from what a file's header tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import LengthGroupedSampler

from storm_vlm.data.row import Row
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.data.video import video_shape
from storm_vlm.training.planning import PlanRequest, video_grid


def row_lengths(rows: Sequence[Row], processor: Any, num_frames: int) -> list[int]:
    """Tokens of each row's prompt, but for the template's. Raises VideoError for a file that cannot be opened."""
    videos = list(dict.fromkeys(row.video for row in rows))
    with thread_pool() as pool:
        shapes = list(
            tqdm(pool.map(video_shape, videos), "video headers", len(videos), leave=False)
        )
    shape_of = dict(zip(videos, shapes, strict=True))

    @cache
    def visual(frames: int, height: int, width: int) -> int:
        shown = min(frames or num_frames, num_frames)
        request = PlanRequest(num_frames=shown, width=width, height=height)
        grids, rows_, columns = video_grid(processor.video_processor, request)
        return grids * rows_ * columns // processor.video_processor.merge_size**2

    texts = ["\n".join((row.question, *row.options)) for row in rows]
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [visual(*shape_of[row.video]) + len(text) for row, text in zip(rows, ids, strict=True)]


class LengthSampler(LengthGroupedSampler):
    """transformers' sampler, but its order depends on seed and epoch alone, so that a resumed run has the same."""

    def __init__(
        self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()
