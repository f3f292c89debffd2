"""Which token may follow: the rules of the latent segment, as a function of the ids alone.

``<|latent_start|>``, then up to K ``<|latent_pad|>``, then always ``<|latent_end|>`` (section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from storm_vlm.model.tokens import LatentTokens

NEVER = float("-inf")


def latent_segment(input_ids: Tensor, tokens: LatentTokens, budget: int) -> tuple[Tensor, Tensor]:
    """Per row of ids (B, T): is the latent segment open (B,) bool, and how many slots has it (B,) long.

    Derived from the ids alone, without a device synchronisation.
    """
    if input_ids.shape[1] == 0:  # a prompt of embeddings only
        used = input_ids.new_zeros(len(input_ids))
        return used.bool(), used
    trailing = (input_ids[:, -(budget + 1) :] == tokens.pad).flip(1)
    used = trailing.long().cumprod(1).sum(1)
    before = (input_ids.shape[1] - 1 - used).clamp_min(0)
    return input_ids.gather(1, before[:, None])[:, 0] == tokens.start, used


class LatentBudgetProcessor(LogitsProcessor):
    """Chooses the tokens of the latent segment and keeps them out of the text. Must run last."""

    def __init__(
        self,
        tokens: LatentTokens,
        budget: int,
        sampling: bool,
        prompt_length: int,
        forced: bool = False,  # the prompts have opened the segment
    ) -> None:
        self.tokens, self.budget, self.sampling = tokens, budget, sampling
        self.latent = torch.tensor(tokens)
        self.forced = forced
        self.once = forced or budget == 0  # no segment opens behind the prompt
        self.first = max(prompt_length - 1, 0)  # the prompt's last token may open the segment
        self.last = (
            prompt_length + budget
        )  # ids that may leave it open, where the prompt has opened it

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in, scores out. Forced choices score 0, so they leave a beam's score alone."""
        _, pad, end = self.tokens
        outside = self._outside(input_ids, scores)
        if self._is_over(input_ids):
            return outside
        is_open, used = self._segment(input_ids)
        full = used >= self.budget
        inside = torch.full_like(scores, NEVER)
        if self.sampling:  # keep p(end); all other probability means "one more slot"
            others = scores.clone()
            others[:, end] = NEVER
            inside[:, pad] = others.logsumexp(-1).masked_fill_(full, NEVER)
            inside[:, end] = scores[:, end].masked_fill(full, 0.0)
        else:
            ends = full | (scores.argmax(-1) == end)
            inside.scatter_(1, torch.where(ends, end, pad)[:, None], 0.0)
        return torch.where(is_open[:, None], inside, outside)

    def bar(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) without the segment's tokens where they have no place, for top-p and its like to choose from.

        Else these might leave nothing but such tokens, and so nothing at all.
        """
        outside = self._outside(input_ids, scores)
        if self._is_over(input_ids):
            return outside
        is_open, _ = self._segment(input_ids)
        return torch.where(is_open[:, None], scores, outside)

    def _outside(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        start = self.tokens.start
        self.latent = self.latent.to(scores.device)
        outside = scores.index_fill(1, self.latent, NEVER)
        if not self.once:
            opened = (input_ids[:, self.first :] == start).any(1)
            outside[:, start] = scores[:, start].masked_fill(opened, NEVER)
        return outside

    def _segment(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`latent_segment`, with less to count where all prompts opened it: what is open has a slot for each step."""
        if not self.forced:
            return latent_segment(input_ids, self.tokens, self.budget)
        steps = input_ids.shape[1] - 1 - self.first
        is_open = input_ids[:, -1] == (self.tokens.pad if steps else self.tokens.start)
        return is_open, is_open * steps

    def _is_over(self, input_ids: Tensor) -> bool:
        """Whether no segment can be open, known from the length alone."""
        return self.once and input_ids.shape[1] > self.last


class LatentProcessors(LogitsProcessorList):
    """All processors of one generate: where it samples, the rule's bar before them, and the rule behind them."""

    def __init__(self, processors: LogitsProcessorList, rule: LatentBudgetProcessor) -> None:
        super().__init__(processors)
        self.rule = rule

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Tensor:
        if self.rule.sampling:
            scores = self.rule.bar(input_ids, scores)
        return self.rule(input_ids, super().__call__(input_ids, scores, **kwargs))
