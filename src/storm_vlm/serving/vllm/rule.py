"""Which token may follow, by request: the rule of `storm_vlm.model.segment` for a batch that changes. No vLLM.

A request says ``latent_mode`` and ``latent_budget`` in its extra arguments (``extra_args`` of `SamplingParams`,
``vllm_xargs`` over HTTP), as in `generate`. ``force``, the default, writes ``<|latent_start|>`` itself where the
prompt does not end in it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from storm_vlm.model.generation import LATENT_MODES
from storm_vlm.model.segment import LatentBudgetProcessor
from storm_vlm.model.tokens import latent_tokens

NEVER = float("-inf")
NOTHING = -1  # no token's id
GREEDY_BELOW = 1e-5  # temperatures; vLLM's bound


@dataclass(frozen=True)
class Request:
    """What the rule must know of a request beside its tokens."""

    mode: str
    budget: int
    seed: int | str
    warpers: LogitsProcessorList | None  #: of the sampler; None: greedy

    def may_be_open(self, written: int) -> bool:
        """Whether the segment can be open behind so many tokens, without a look at them."""
        return self.mode == "auto" or written <= self.budget + 2

    def draw(self, written: int) -> float:
        """Uniform in [0, 1), the same on every rank."""
        return random.Random(f"{self.seed} {written}").random()


def latent_arguments(params: Any, budget: int) -> tuple[str, int]:
    """The mode of a request, and its budget, by default this. Raises ValueError, which fails this request alone."""
    known: dict[str, Any] = {"latent_mode": "force", "latent_budget": budget}
    given = {key: v for key, v in (params.extra_args or {}).items() if key.startswith("latent_")}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{unknown[0]} is unknown: a request has {' and '.join(known)}")
    mode, budget = {**known, **given}.values()
    if mode not in LATENT_MODES:
        raise ValueError(f"latent_mode must be one of {LATENT_MODES}, got {mode!r}")
    if type(budget) is not int or not 0 <= budget <= 1024:
        raise ValueError(f"latent_budget must be a whole number from 0 to 1024, got {budget!r}")
    return mode, 0 if mode == "off" else budget


def check_params(params: Any) -> None:
    """Raises ValueError, which fails this request alone."""
    _, budget = latent_arguments(params, 1)
    if budget and params.structured_outputs is not None:
        raise ValueError("a grammar knows no latent slots: drop it, or use latent_mode='off'")
    if budget and params.max_tokens is not None and params.max_tokens < 3:
        raise ValueError(
            f"max_tokens={params.max_tokens} leaves no room for latent slots and an answer: ask for more, or use "
            "latent_mode='off'; beam search is not to be had"
        )


class Segment:
    """The rule for all rows of a batch."""

    def __init__(self, vllm_config: Any) -> None:
        config = vllm_config.model_config.hf_config
        self.tokens, self.budget = latent_tokens(config), config.latent_budget
        self.seeds = (f"{vllm_config.model_config.seed} {number}" for number in count())

    def request(self, params: Any) -> Request:
        steps: list[Any] = [TemperatureLogitsWarper(max(params.temperature, GREEDY_BELOW))]
        steps += [TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []
        steps += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        steps += [MinPLogitsWarper(params.min_p)] if params.min_p > 0 else []
        warpers = LogitsProcessorList(steps) if params.temperature >= GREEDY_BELOW else None
        seed = next(self.seeds) if params.seed is None else params.seed
        return Request(*latent_arguments(params, self.budget), seed, warpers)

    def apply(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        written: Sequence[int],
        ids_of: Callable[[list[int], int], Tensor],
    ) -> Tensor:
        """Logits (R, V), changed in place, of requests that have written so many tokens.

        ``ids_of`` some rows and a width W: their ids (n, W) from the prompt's very last on, `NOTHING` before those.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        closed = []
        for row, (request, number) in enumerate(zip(requests, written, strict=True)):
            (groups[request.budget] if request.may_be_open(number) else closed).append(row)
        for budget, rows in groups.items():
            ids, scores = ids_of(rows, 1 + max(written[row] for row in rows)), logits[rows]
            for i, row in enumerate(rows if budget else []):
                self._decide(scores[i], ids[i], requests[row], written[row])
            rule = LatentBudgetProcessor(self.tokens, budget, sampling=False, prompt_length=1)
            logits[rows] = rule(ids, scores)  # type: ignore[arg-type]
        at, latent = (
            torch.tensor(n, dtype=torch.long).to(logits.device) for n in (closed, self.tokens)
        )
        logits[at[:, None], latent] = NEVER
        return logits

    def _decide(self, scores: Tensor, ids: Tensor, request: Request, written: int) -> None:
        """Change scores (V,) so that the greedy rule finds what was drawn, or the start that is forced."""
        start, _, end = self.tokens
        if request.warpers is not None:  # p(end) decides, all else means "one more slot"
            warped = request.warpers(ids[None], scores[None].clone())  # type: ignore[arg-type]
            stops = warped.softmax(-1)[0, end] > request.draw(written)  # type: ignore[index]
            scores[end] = torch.where(stops, float("inf"), NEVER)
        if request.mode == "force" and written == 0:
            forced = torch.full_like(scores, NEVER)
            forced[start] = 0.0
            scores.copy_(torch.where(ids[-1] == start, scores, forced))
