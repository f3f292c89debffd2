"""Does the answer depend on the latent states? Tamper with them and look (cf. paper, appendix A).

All prompts of a batch are read once; every intervention continues from that cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from storm_vlm.rollout import Prompt, answer_ids, embed, head, read_prompt, unwrap
from storm_vlm.tokens import latent_tokens

Intervention = Literal["none", "drop", "swap_keys_values", "swap_inputs"]


@torch.no_grad()
def latent_interventions(
    model: Any,
    batch: Mapping[str, Any],
    budget: int,
    permutation: Tensor,
    kinds: Sequence[Intervention] = ("none", "drop", "swap_keys_values", "swap_inputs"),
) -> dict[Intervention, Tensor]:
    """Answer logits (B, A, V) when the latent segment is tampered with; the prompt is read once for
    all kinds.

    ``none``: the plain rollout. ``drop``: ``<|latent_end|>`` and the answer cannot attend to
        ``<|latent_start|>`` and
    the slots, positions kept. ``swap_keys_values``: the slots' keys and values are row
    ``permutation[b]``'s, with keys turned to row b's positions so that only content differs.
    ``swap_inputs``: row ``permutation[b]``'s states are fed into the slots, in sight of row b's own
    video.

    Args:
        model, batch, budget: as in `rollout`; the budget is at least 1.
        permutation: (B,) long, the donor of every row.
        kinds: which of the four to compute.
    """
    if budget < 1:
        raise ValueError("latent_interventions needs a budget of at least 1 slot")
    model = unwrap(model)
    tail = embed(model, answer_ids(model, batch, budget))
    prompt, hidden = read_prompt(model, batch)
    states = [hidden[:, -1:]]
    for _ in range(budget):  # slot K is fed, too: all keys and values must be in the cache
        states.append(prompt.extend(states[-1]))
    slots = torch.cat(states[:budget], 1)
    outputs: dict[Intervention, Tensor] = {}
    if "none" in kinds:
        outputs["none"] = prompt.peek(tail)
    if "drop" in kinds:
        outputs["drop"] = prompt.peek(tail, slice(prompt.length - 1, prompt.length + budget))
    if "swap_keys_values" in kinds:
        own = [(layer.keys, layer.values) for layer in _layers(prompt)]
        _swap_keys_values(prompt, permutation)
        outputs["swap_keys_values"] = prompt.peek(tail)
        for layer, (keys, values) in zip(_layers(prompt), own, strict=True):
            layer.keys, layer.values = keys, values
    if "swap_inputs" in kinds:
        prompt.cache.crop(-budget)
        outputs["swap_inputs"] = prompt.extend(torch.cat([slots[permutation], tail], 1))[:, budget:]
    return {kind: head(model, output) for kind, output in outputs.items()}


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


def _swap_keys_values(prompt: Prompt, permutation: Tensor) -> None:
    """Give every row its donor's keys and values behind the prompt."""
    # The three axes of a text position are equal, so turning keys is plain RoPE by the difference.
    shift = (prompt.last_position - prompt.last_position[:, permutation])[0].float()  # (B, 1)
    angle = shift * prompt.core.language_model.rotary_emb.inv_freq
    angle = torch.cat([angle, angle], -1)[:, None, None]  # (B, 1, 1, head size)
    for layer in _layers(prompt):
        own_keys, own_values = (
            layer.keys[:, :, : prompt.length],
            layer.values[:, :, : prompt.length],
        )
        keys = layer.keys[permutation, :, prompt.length :]
        first, second = keys.chunk(2, -1)
        rotated = torch.cat([-second, first], -1)
        keys = keys * angle.cos().to(keys) + rotated * angle.sin().to(keys)
        layer.keys = torch.cat([own_keys, keys], 2)
        layer.values = torch.cat([own_values, layer.values[permutation, :, prompt.length :]], 2)


def _layers(prompt: Prompt) -> list[Any]:
    return list(prompt.cache.layers)
