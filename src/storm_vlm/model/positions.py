"""M-RoPE positions by the rule Qwen2.5-VL was trained with.

transformers 5 lets the text after a video resume at ``start + max(height, width)``, so the question
overlaps the temporal axis of a long video (and 5.17 truncates the seconds per temporal grid to an
integer). The released weights were trained with: every block starts at the largest position so far
plus one, and the temporal index is ``floor(grid index * seconds per grid * tokens per second)``.

The product is taken in float32, as in the code published with the weights (``get_rope_index`` of
transformers 4.49, ``rope2d.py`` of Qwen's finetuning code: an integer range times a float). vLLM
follows the same rule in float64, and starts from seconds rounded to float32. Where the exact product is
an integer, that falls below it more often: at round rates a third of all clips differ by one step
in some grid, and float32 is the nearer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2


class TrainedPositions:
    """Mixed into the stock ``Qwen2_5_VLModel``: forward and generate both follow `rope_index`."""

    config: Any

    def get_rope_index(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | Iterable[float] | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Positions (3, B, T) and deltas (B, 1); see `rope_index`."""
        if mm_token_type_ids is None:
            mm_token_type_ids = torch.zeros_like(input_ids)
        vision = self.config.vision_config
        return rope_index(
            mm_token_type_ids,
            attention_mask,
            image_grids=_rows(image_grid_thw),
            video_grids=_rows(video_grid_thw),
            seconds_per_grid=_rows(second_per_grid_ts),
            merge_size=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
        )


def rope_index(
    token_types: Tensor,
    attention_mask: Tensor | None,
    *,
    image_grids: list[list[int]],
    video_grids: list[list[int]],
    seconds_per_grid: list[float],
    merge_size: int,
    tokens_per_second: float,
) -> tuple[Tensor, Tensor]:
    """Positions of a batch that may be padded on either side.

    Args:
        token_types: (B, T), 0 text, 1 image, 2 video.
        attention_mask: (B, T), 0 where padded; None means no padding.
        image_grids, video_grids: [time, height, width] in patches, in order of appearance over the whole batch.
        seconds_per_grid: seconds between the temporal grids of each video; none at all: 1.0 each.
        merge_size: patches per token along height and along width.
        tokens_per_second: temporal positions per second.

    Returns:
        positions (3, B, T), 0 where padded, and deltas (B, 1): next position minus the row's unpadded length.

    Raises:
        LatentError: the grids do not account for the image and video tokens of ``token_types``.
    """
    device = token_types.device
    types = token_types.cpu()  # one transfer: what follows are a few small tensors a row
    keep = torch.ones_like(types) if attention_mask is None else attention_mask.cpu()
    keep = keep != 0
    seconds = iter(seconds_per_grid)
    grids = {
        IMAGE: iter([(grid, 0.0) for grid in image_grids]),
        VIDEO: iter([(grid, next(seconds, 1.0)) for grid in video_grids]),
    }
    positions = torch.zeros(3, *types.shape, dtype=torch.long)
    deltas = torch.zeros(types.shape[0], 1, dtype=torch.long)
    for row in range(types.shape[0]):
        kinds, lengths = torch.unique_consecutive(types[row][keep[row]], return_counts=True)
        blocks, start = [], 0
        for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
            for block in _blocks(kind, length, grids, merge_size, tokens_per_second):
                blocks.append(block + start)
                start = int(blocks[-1].max()) + 1
        if blocks:
            positions[:, row, keep[row]] = torch.cat(blocks, dim=1)
        deltas[row] = start - int(keep[row].sum())
    return positions.to(device), deltas.to(device)


def _blocks(
    kind: int,
    length: int,
    grids: dict[int, Iterator[tuple[list[int], float]]],
    merge_size: int,
    tokens_per_second: float,
) -> Iterator[Tensor]:
    """Blocks (3, n), each counted from 0, of a run of ``length`` tokens of one kind."""
    if kind == TEXT:
        yield torch.arange(length).expand(3, -1)
        return
    while length > 0:  # a run may hold several videos that no text separates
        grid, seconds = next(grids[kind], (None, 0.0))
        if grid is None:
            break
        # in float32, see above
        time = torch.arange(grid[0]) * torch.tensor(float(seconds)) * tokens_per_second
        sides = (torch.arange(side // merge_size) for side in grid[1:])
        block = torch.stack(torch.meshgrid(time.long(), *sides, indexing="ij")).flatten(1)
        length -= block.shape[1]
        yield block
    if length != 0:
        name = "image" if kind == IMAGE else "video"
        raise ValueError(
            f"{name} tokens and {name}_grid_thw disagree by {length} tokens: rebuild the inputs"
        )


def _rows(values: Tensor | Iterable[Any] | None) -> list[Any]:
    return [] if values is None else values.tolist() if isinstance(values, Tensor) else list(values)
