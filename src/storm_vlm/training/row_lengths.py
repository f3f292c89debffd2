"""Batches of rows that are about equally long, so that little of a batch is padding (`group_by_length`).

A row's length is mostly its video's share, which follows from what a file's header tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import LengthGroupedSampler

from storm_vlm.data.check import check_length, row_faults
from storm_vlm.data.collator import LAYOUT, StormCollator, VideoInputs
from storm_vlm.data.processor import video_grid
from storm_vlm.data.row import Row
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.data.video import Clip, video_shape

TEMPLATE = 64  # tokens that a chat template adds, at most
LARGE = (2304, 4096)  # pixels of a frame that has as many tokens as there can be


def row_lengths(rows: Sequence[Row], processor: Any, num_frames: int) -> list[int]:
    """Tokens of each row's prompt, but for the template's. Raises VideoError for a file that cannot be opened."""
    videos = list(dict.fromkeys(row.video for row in rows))
    with thread_pool() as pool:
        shapes = list(
            tqdm(pool.map(video_shape, videos), "video headers", len(videos), leave=False)
        )
    shape_of, visual = dict(zip(videos, shapes, strict=True)), _visual_tokens(processor, num_frames)
    texts = _text_tokens(rows, processor)
    return [visual(*shape_of[row.video]) + text for row, text in zip(rows, texts, strict=True)]


def long_rows(rows: Sequence[Row], collator: StormCollator, config: Any) -> dict[str, str]:
    """Why a model of this config cannot read some rows' prompts, by id. Raises VideoError.

    No file is opened where even the largest frames would fit.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")
    processor, num_frames = collator.processor, collator.videos.num_frames
    room = longest - TEMPLATE - _visual_tokens(processor, num_frames)(0, *LARGE)
    texts = _text_tokens(rows, processor)
    rows = [row for row, text in zip(rows, texts, strict=True) if text > room]
    lengths = row_lengths(rows, processor, num_frames)
    rows = [r for r, length in zip(rows, lengths, strict=True) if length + TEMPLATE > longest]

    def check(row: Row) -> None:
        prompt = collator.collate_prompts([row], "force" if collator.latent_budget else "off")
        check_length(config, prompt["input_ids"].shape[1])

    return row_faults(rows, check, workers=1)


def _text_tokens(rows: Sequence[Row], processor: Any) -> list[int]:
    texts = ["\n".join((row.question, *row.options)) for row in rows]
    if not texts:
        return []
    return list(map(len, processor.tokenizer(texts, add_special_tokens=False)["input_ids"]))


def _visual_tokens(processor: Any, num_frames: int) -> Callable[[int, int, int], int]:
    """Tokens of a clip by what `video_shape` tells: frames, height, width. If it drops some, of one that moves."""

    @cache
    def visual(frames: int, height: int, width: int) -> int:
        shown = min(frames or num_frames, num_frames)
        times = 100.0 * np.arange(shown)  # where times stand in the prompt, with digits enough
        blank = Clip(np.zeros((shown, 56, 56, 3), np.uint8), times, "a blank clip")
        tensors = VideoInputs(processor, shown).process(blank)
        if "video_grid_thw" not in tensors:  # frames of one size
            return len(tensors[LAYOUT])
        names = ("video_token_id", "image_token_id")
        ids = torch.tensor([getattr(processor, n) for n in names if hasattr(processor, n)])
        text = int(
            (~torch.isin(tensors[LAYOUT], ids)).sum()
        )  # all but what it shows of a blank clip
        video = processor.video_processor
        patches = math.prod(video_grid(video, shown, height, width))
        return text + patches // video.merge_size**2

    return visual


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
