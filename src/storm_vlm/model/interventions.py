"""Latent states, and the answers when others are fed (cf. paper, appendix A): what `analysis/` asks with.

All prompts of a batch are read once; everything continues from that cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from storm_vlm.model.backbones import unwrap
from storm_vlm.model.rollout import embed, head, read_prompt
from storm_vlm.model.tokens import latent_tokens


@torch.no_grad()
def latent_states(model: Any, batch: Mapping[str, Any], budget: int) -> tuple[Tensor, Tensor]:
    """The model's own states (B, K, D) on their way into K slots, and those of the prompt (B, T, D).

    K may exceed the budget that the model was trained with.
    """
    model = unwrap(model)
    prompt, hidden = read_prompt(model, batch)
    states = [hidden[:, -1:]]
    while len(states) < budget:
        states.append(prompt.extend(states[-1]))
    return torch.cat(states, 1), hidden


@torch.no_grad()
def answers_when_fed(
    model: Any, batch: Mapping[str, Any], slots: Mapping[str, Tensor], max_new_tokens: int = 32
) -> dict[str, Tensor]:
    """Logits (B, A, V) of greedy answers after each kind of slots, (B, n, D) of whatever n, 0 included.

    The prompt is read once for all kinds. A is where every row has ended its answer; what a row writes behind
    its own end means nothing.
    """
    model = unwrap(model)
    closing = torch.full_like(batch["input_ids"][:, :1], latent_tokens(model.config).end)
    prompt, _ = read_prompt(model, batch)
    outputs: dict[str, Tensor] = {}
    for kind, states in slots.items():
        end = embed(model, closing)
        fed, logits = torch.cat([states.to(end), end], 1), []
        ended = torch.zeros_like(closing[:, 0], dtype=torch.bool)
        while len(logits) < max_new_tokens and not bool(ended.all()):
            logits.append(head(model, prompt.extend(fed)[:, -1:]))
            chosen = logits[-1].argmax(-1)
            ended |= torch.isin(chosen[:, 0], end_tokens(model).to(chosen.device))
            fed = embed(model, chosen)
        prompt.cache.crop(prompt.length - prompt.cache.get_seq_length())
        outputs[kind] = torch.cat(logits, 1)
    return outputs


def end_tokens(model: Any) -> Tensor:
    """Ids that end an answer, (n,)."""
    ids = unwrap(model).generation_config.eos_token_id
    return torch.tensor([] if ids is None else ids, dtype=torch.long).flatten()


def noised(states: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """States (..., D) plus noise `scale` times as long as they are, brought back to their length."""
    noise = torch.randn(states.shape, generator=generator).to(states)
    length = states.norm(dim=-1, keepdim=True)
    moved = states + scale * length * noise / noise.norm(dim=-1, keepdim=True)
    return moved * (length / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def reordered(states: Tensor, order: Tensor) -> Tensor:
    """States (B, K, D) with slot ``order[b, k]``'s state in slot k; `order` is (B, n) or (n,)."""
    return torch.take_along_dim(states, order.expand(len(states), -1)[..., None], 1)
