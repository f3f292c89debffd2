"""M-RoPE positions by the rule Qwen2-VL and Qwen2.5-VL were trained with.

transformers 5 lets the text after a video resume at ``start + max(height, width)``, so the question
overlaps the temporal axis of a long video (and 5.17 truncates the seconds per temporal grid to an
integer). The released weights were trained with: every block starts at the largest position so far
plus one, and the temporal index is ``floor(grid index * seconds per grid * tokens per second)``
(Qwen2-VL, which knows no seconds: the grid index).

The product is taken in float32, as in the code published with the weights (``get_rope_index`` of
transformers 4.49, ``rope2d.py`` of Qwen's finetuning code: an integer range times a float). vLLM
follows the same rule in float64, and starts from seconds rounded to float32. Where the exact product is
an integer, that falls below it more often: at round rates a third of all clips differ by one step
in some grid, and float32 is the nearer one.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2


class TrainedPositions:
    """Mixed into the stock ``Qwen2_5_VLModel`` or ``Qwen2VLModel``, whose forward and generate follow it then."""

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
        """Positions of a batch that may be padded on either side.

        Args:
            input_ids: (B, T).
            mm_token_type_ids: (B, T), 0 text, 1 image, 2 video; None: all text.
            image_grid_thw, video_grid_thw: (n, 3) time, height, width in patches, in order over the whole batch.
            second_per_grid_ts: seconds between the temporal grids of each video; None: 1.0 each.
            attention_mask: (B, T), 0 where padded; None means no padding.

        Returns:
            positions (3, B, T), 0 where padded, and deltas (B, 1): next position minus the row's unpadded length.

        Raises:
            ValueError: the grids do not account for the image and video tokens.
        """
        types = torch.zeros_like(input_ids) if mm_token_type_ids is None else mm_token_type_ids
        types = types.cpu()  # one transfer: what follows are a few small tensors a row
        keep = types >= 0 if attention_mask is None else attention_mask.cpu() != 0
        seconds: Any = chain([] if second_per_grid_ts is None else second_per_grid_ts, repeat(1.0))
        blocks = {
            IMAGE: (self._block(grid, 0.0) for grid in _rows(image_grid_thw)),
            VIDEO: map(self._block, _rows(video_grid_thw), seconds),
        }
        positions = torch.zeros(3, *types.shape, dtype=torch.long)
        deltas = torch.zeros(len(types), 1, dtype=torch.long)
        for row, kept in enumerate(keep):
            kinds, lengths = torch.unique_consecutive(types[row][kept], return_counts=True)
            placed, start = [torch.zeros(3, 0, dtype=torch.long)], 0
            for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
                while length > 0:  # a run may hold several videos that no text separates
                    text = torch.arange(length).expand(3, -1)
                    block = text if kind == TEXT else next(blocks[kind], None)
                    if block is None:
                        break
                    placed.append(block + start)
                    start = int(placed[-1].max()) + 1
                    length -= block.shape[1]
                if length != 0:
                    name = "image" if kind == IMAGE else "video"
                    raise ValueError(
                        f"{name} tokens and {name}_grid_thw disagree by {length} tokens: rebuild the inputs"
                    )
            positions[:, row, kept] = torch.cat(placed, 1)
            deltas[row] = start - int(kept.sum())
        return positions.to(input_ids.device), deltas.to(input_ids.device)

    def _block(self, grid: list[int], seconds: float) -> Tensor:
        """Positions (3, n) of an image or a video, counted from 0."""
        vision = self.config.vision_config
        # in float32, see above
        rate = getattr(vision, "tokens_per_second", 1)
        time = torch.arange(grid[0]) * torch.tensor(float(seconds)) * rate
        sides = (torch.arange(side // vision.spatial_merge_size) for side in grid[1:])
        return torch.stack(torch.meshgrid(time.long(), *sides, indexing="ij")).flatten(1)


def _rows(grids: Tensor | None) -> list[list[int]]:
    return [] if grids is None else grids.tolist()
