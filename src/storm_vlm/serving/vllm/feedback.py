"""The method inside a paged engine: the last hidden state is the input of a latent slot. Plain torch, no vLLM.

An engine hands over a flat batch of tokens: the next token of some sequences, pieces of others. It moves, pauses
and recomputes sequences as it likes. What it keeps of them are blocks of keys and values. So the state that the
next slot needs is kept *with the block*: one row for each block, the state at the last token written into it. The
next token finds it in the block of the token before. Whatever happens to the block happens to the state: sequences
may share a prefix, come in pieces and change places, with no bookkeeping of requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """T tokens of R sequences in one forward, as the attention metadata describe them."""

    ids: Tensor  #: (T,)
    bounds: Tensor  #: (R + 1,) where each sequence's tokens begin, and T
    lengths: Tensor  #: (R,) of the sequences, these tokens included; 0 where a row only fills up
    table: Tensor  #: (R or more, blocks) which blocks a sequence has
    block_size: int  #: tokens

    @property
    def one_each(self) -> bool:
        """Known from shapes alone, as it must be where a CUDA graph is captured."""
        return len(self.ids) == len(self.lengths)

    def block(self, row: Tensor, position: Tensor) -> Tensor:
        """The blocks that hold tokens (n,) of sequences (n,)."""
        return self.table[row, position.clamp_min(0) // self.block_size].long()


class Feedback:
    """States (blocks + 1, D), one for each block of keys and values; the last row takes what is of no sequence."""

    def __init__(self, pad: int, blocks: int, like: Tensor) -> None:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the states were to be made within a CUDA graph, which would clear them at each replay"
            )
        self.pad, self.blocks = pad, blocks
        self.states = like.new_zeros(blocks + 1, like.shape[-1])

    def forward(self, batch: Batch, embeds: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """States (T, D) of a forward whose latent pads are fed the state before them.

        ``embeds`` (T or more, D) is changed in place, since a captured graph reads that very buffer. ``run`` is the
        stock forward, from embeddings to states.
        """
        count, rows = len(batch.ids), torch.arange(len(batch.lengths), device=batch.ids.device)
        first = rows if batch.one_each else batch.bounds[:-1].long()
        sizes = 1 if batch.one_each else batch.bounds.diff()
        past = batch.lengths - sizes
        before = self.states[batch.block(rows, past - 1)]
        slots = (batch.ids == self.pad)[:, None]
        embeds[first] = torch.where(slots[first], before, embeds[first])
        hidden = run(embeds)
        if not batch.one_each:
            slots[first] = False
            # Behind a preemption slots come several at once. Each state is known one pass after the one before.
            for _ in range(_most(slots[:, 0], batch.bounds)):
                embeds[1:count] = torch.where(slots[1:], hidden[: count - 1], embeds[1:count])
                hidden = run(embeds)
            self._keep_full_blocks(batch, past, hidden)
        block = batch.block(rows, batch.lengths - 1)
        self.states[torch.where(batch.lengths > 0, block, self.blocks)] = hidden[first + sizes - 1]
        return hidden

    def _keep_full_blocks(self, batch: Batch, past: Tensor, hidden: Tensor) -> None:
        """States at the ends of blocks, from which another sequence may go on (prefix caching)."""
        rows = torch.arange(len(batch.lengths), device=batch.ids.device)
        row = torch.repeat_interleave(rows, batch.bounds.diff())
        token = torch.arange(len(batch.ids), device=row.device)
        position = past[row] + token - batch.bounds[row]
        ends = ((position + 1) % batch.block_size == 0).nonzero()[:, 0]
        self.states[batch.block(row[ends], position[ends])] = hidden[ends]


def _most(slots: Tensor, bounds: Tensor) -> int:
    """The most slots (T,) of one sequence; read on the host, so never in a captured graph."""
    total = torch.cat([slots.new_zeros(1, dtype=torch.long), slots.cumsum(0)])
    return int(total[bounds.long()].diff().max())
