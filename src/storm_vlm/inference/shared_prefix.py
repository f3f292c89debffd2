"""What prompts about one clip have in common is read once: its features, and the cache of all before the question."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from storm_vlm.data.collator import join_clips, token_types
from storm_vlm.model.backbones import cache_argument, input_device

Video = dict[str, Tensor]


def read_prefixes(
    model: Any, processor: Any, ids: Sequence[list[int]], videos: Sequence[Video | None]
) -> dict[str, Any] | None:
    """Inputs of ``generate`` that hold the cache of the prefixes: one forward over each clip's, copied to its rows.

    `input_ids` and `attention_mask` (B, P + S) are prefixes and rests, each padded on the left, so that padding
    stands between them, too; `position_ids` are those that each row alone would have. `ids` are the tokens of
    `StormCollator.prompts`, `videos` its clips. None where no two prompts share a clip, where something else than the
    question comes behind it, and where the model's cache holds more than keys and values of each token: ask as usual
    then.
    """
    groups: dict[int, list[int]] = {}
    for row, video in enumerate(videos):
        groups.setdefault(id(video), []).append(row)
    cache = DynamicCache(config=model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if len(groups) == len(videos) or None in videos or not plain:
        return None
    prefixes = [_common([ids[row] for row in rows]) for rows in groups.values()]
    group_of = {row: group for group, rows in enumerate(groups.values()) for row in rows}
    rests = [row_ids[len(prefixes[group_of[row]]) :] for row, row_ids in enumerate(ids)]
    visual = {getattr(processor, name, None) for name in ("video_token_id", "image_token_id")}
    if any(visual & set(rest) for rest in rests):
        return None
    device = input_device(model)
    clips: list[Any] = [videos[rows[0]] for rows in groups.values()]
    joined = join_clips(processor, clips)
    prefix = _padded(prefixes, processor, device)
    prefix |= {name: tensor.to(device) for name, tensor in joined.items()}
    # by the model's own rule, which also leaves behind how far positions are ahead of tokens
    positions = model._prepare_position_ids_for_generation(prefix["input_ids"], dict(prefix))
    ahead: Any = getattr(model.base_model, "rope_deltas", None)
    given = {cache_argument(model): cache}
    model(**prefix, position_ids=positions, use_cache=True, logits_to_keep=1, **given)
    place = torch.tensor([group_of[row] for row in range(len(ids))], device=device)
    cache.batch_select_indices(place)
    rest = _padded(rests, processor, device)
    whole = {
        name: torch.cat([prefix[name][place], rest[name]], 1)
        for name in ("input_ids", "attention_mask")
    }
    count = (whole["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if positions.ndim == 3:  # the count, and time, height and width
        count = torch.stack([count, *[count + ahead[place]] * 3])[-len(positions) :]
    return {**whole, "position_ids": count, **given}


def _common(rows: Sequence[list[int]]) -> list[int]:
    """What they begin with, one token at least left to each."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return [tokens[0] for tokens in alike][: min(map(len, rows)) - 1]


def _padded(rows: Sequence[list[int]], processor: Any, device: Any) -> dict[str, Tensor]:
    """Ids, mask and kinds of token (B, T); the padding on the left is out of the mask."""
    length, pad = max(map(len, rows)), processor.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, **token_types(processor, ids)}
