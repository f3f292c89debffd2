# pyright: reportMissingImports=false
"""How many slots an answer had: in vLLM's usage, and of an offline output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.reasoning.identity_reasoning_parser import IdentityReasoningParser

from storm_vlm.model.tokens import LATENT_TOKENS, LatentTokens


class SlotCount(IdentityReasoningParser):
    """``--reasoning-parser storm``: slots are reasoning tokens; the text is left alone."""

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return list(token_ids).count(self.vocab[LATENT_TOKENS[1]])


@dataclass(frozen=True)
class Slots:
    """Of one answer; ``forced_end`` as in `generate`, None where ``logprobs`` were not asked for."""

    used: int
    forced_end: bool | None


def slots_of(completion: Any, tokens: LatentTokens, budget: int) -> Slots:
    """Slots of a `CompletionOutput` whose request had this budget."""
    ids = list(completion.token_ids)
    used = ids.count(tokens.pad)
    if completion.logprobs is None:
        return Slots(used, None)
    ends = [i for i, token in enumerate(ids) if token == tokens.end]
    wanted = any(completion.logprobs[i][tokens.end].rank == 1 for i in ends)
    return Slots(used, bool(ends) and used == budget and not wanted)
