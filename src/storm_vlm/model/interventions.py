"""Latent states, and the answers when others are fed (cf. paper, appendix A): what `analysis/` asks with.

All prompts of a batch are read once; everything continues from that cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from storm_vlm.model.backbones import backbone, input_device, unwrap
from storm_vlm.model.rollout import Prompt, embed, head, read_prompt
from storm_vlm.model.tokens import latent_tokens


@torch.no_grad()
def latent_states(model: Any, batch: Mapping[str, Any], budget: int) -> tuple[Tensor, Tensor]:
    """What the model feeds into K slots (B, K, D): its own states, or its pause token; and the prompt's (B, T, D).

    K may exceed the budget that the model was trained with.
    """
    model = unwrap(model)
    prompt, hidden = read_prompt(model, batch)
    if getattr(model.config, "latent_pause", False):
        pads = pause_slots(model, len(hidden), budget)
        prompt.extend(pads)  # for who records layers
        return pads, hidden
    states = [hidden[:, -1:]]
    while len(states) < budget:
        states.append(prompt.extend(states[-1]))
    return torch.cat(states, 1), hidden


def own_slots(model: Any, states: Tensor) -> Tensor:
    """States (B, K, D) of `latent_states`, NaN in slots that a row has not: greedy decoding ends its segment before.

    Pause tokens say nothing about an end, so all K of them count.
    """
    model = unwrap(model)
    if getattr(model.config, "latent_pause", False):
        return states
    # Where the state would be fed, the end is chosen instead.
    ended = head(model, states).argmax(-1) == latent_tokens(model.config).end
    return states.masked_fill(ended.cumsum(1)[..., None] > 0, float("nan"))


def pause_slots(model: Any, rows: int, budget: int) -> Tensor:
    """As many slots (rows, K, D) with nothing of the model's own in them: the embedding of ``<|latent_pad|>``."""
    pad = torch.tensor(latent_tokens(unwrap(model).config).pad, device=input_device(model))
    return embed(unwrap(model), pad).expand(rows, budget, -1).detach()


@contextmanager
def recorded_layers(
    model: Any, places: Sequence[int], reduce: Callable[[Tensor], Tensor]
) -> Iterator[list[list[Tensor]]]:
    """While this is open, what ``reduce`` makes of the states (B, n, D) that decoder layers return: of each layer at
    ``places`` a list, pass by pass."""
    layers = backbone(model).decoder.layers
    recorded: list[list[Tensor]] = [[] for _ in places]

    def keep(number: int) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            recorded[number].append(reduce(output[0] if isinstance(output, tuple) else output))

        return hook

    handles = [layers[at].register_forward_hook(keep(i)) for i, at in enumerate(places)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def answers_when_fed(
    model: Any,
    batch: Mapping[str, Any],
    slots: Mapping[str, Tensor | None],
    max_new_tokens: int = 32,
) -> dict[str, Tensor]:
    """Logits (B, A, V) of greedy answers after each kind of slots, (B, n, D) of whatever n, 0 included.

    A slot of NaN is none: the row has so many less. None: without a segment, markers included, as
    ``latent_mode="off"`` has it. The prompt is read once for all kinds.
    A is where every row has ended its answer; what a row writes behind its own end means nothing.
    """
    model = unwrap(model)
    tokens = latent_tokens(model.config)
    closing = embed(model, torch.full_like(batch["input_ids"][:, :1], tokens.end))
    prompt, hidden = read_prompt(model, batch)
    narrow = getattr(model.config, "latent_bottleneck", None) is not None
    behind = prompt.without_video() if narrow else prompt  # the segment
    outputs: dict[str, Tensor] = {}
    for kind, states in slots.items():
        if states is not None:
            follows, missing = behind, states.isnan().any(-1)  # (B, n)
            if states.shape[1]:
                order = missing.long().argsort(dim=1, stable=True)
                prompt.extend(reordered(states, order).nan_to_num().to(closing))
            if bool(missing.any()):
                follows = behind.after_slots((~missing).sum(1).to(closing.device))
            first = head(model, follows.extend(closing))
            outputs[kind] = _written(model, follows, first, max_new_tokens)
            prompt.rewind()
    if plain := [kind for kind, states in slots.items() if states is None]:
        before = _without_start(model, prompt, batch)
        first = head(model, hidden[:, -2:-1])
        barred = torch.tensor(tokens, device=first.device)
        outputs |= dict.fromkeys(plain, _written(model, before, first, max_new_tokens, barred))
    return {kind: outputs[kind] for kind in slots}


def _without_start(model: Any, prompt: Prompt, batch: Mapping[str, Any]) -> Prompt:
    """The prompt before its ``<|latent_start|>``, of which nothing is left."""
    if any(prompt.cache.is_linear):  # a state cannot forget its last token
        ids = ("input_ids", "attention_mask", "mm_token_type_ids")
        return read_prompt(model, {n: t[:, :-1] if n in ids else t for n, t in batch.items()})[0]
    prompt.cache.crop(-1)
    return replace(
        prompt,
        mask=None if prompt.mask is None else prompt.mask[:, :-1],
        last_position=prompt.last_position - 1,
        length=prompt.length - 1,
        video=prompt.video[:, :-1],
    )


def _written(
    model: Any, prompt: Prompt, logits: Tensor, max_new_tokens: int, barred: Tensor | None = None
) -> Tensor:
    """Logits (B, A, V) of a greedy answer, of which the first are given (B, 1, V); no `barred` id is chosen."""
    steps: list[Tensor] = []
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    while True:
        if barred is not None:
            logits = logits.index_fill(-1, barred, float("-inf"))
        steps.append(logits)
        chosen = logits.argmax(-1)
        ended |= torch.isin(chosen[:, 0], end_tokens(model).to(chosen.device))
        if len(steps) == max_new_tokens or bool(ended.all()):
            return torch.cat(steps, 1)
        logits = head(model, prompt.extend(embed(model, chosen))[:, -1:])


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
