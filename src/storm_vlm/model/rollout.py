"""The differentiable latent rollout: training (both stages), diagnostics and interventions (paper, section 3).

One prompt pass fills a key/value cache that keeps its graph, K - 1 one-token passes feed states back, and slot K
travels with ``<|latent_end|>`` and the answer. That is exact (same loss and gradients as recomputing everything for
every slot) and no forward goes unused, which FSDP2 needs. When all slot inputs are known beforehand there is nothing
to wait for, and everything is one ordinary pass.

Call these functions inside *one* forward of the module that DDP or FSDP wraps. Gradient checkpointing is exact, too:
the prompt pass is checkpointed and hands its keys and values on, the short passes are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from storm_vlm.model.attention import SDPA_IN_PARTS, PartsLayer, StatesLayer
from storm_vlm.model.backbones import Backbone, backbone, unwrap
from storm_vlm.model.tokens import LatentError, latent_tokens


@dataclass
class RolloutOutput:
    """What a rollout yields. Without slots (K = 0), start and end logits are None."""

    logits: Tensor  #: (B, A, V): entry a chooses answer token a, i.e. is aligned with ``labels``
    states: Tensor  #: (B, K, D): own state for slot k, from one position earlier
    start_logits: Tensor | None  #: (B, V): must choose ``<|latent_start|>``
    end_logits: Tensor | None  #: (B, V), after a row's last slot: must choose ``<|latent_end|>``
    #: K times (B, 1, D), own states on their way into the slots; their gradients are the credit that flows back
    #: through the feedback. Empty where slots are given, or feedback is detached.
    fed: tuple[Tensor, ...] = ()
    #: (B,), where rows have their own number; states beyond mean nothing
    slots: Tensor | None = None

    @property
    def has_slot(self) -> Tensor:
        """(B, K) bool."""
        batch, budget = self.states.shape[:2]
        count = self.states.new_full((batch,), budget) if self.slots is None else self.slots
        return torch.arange(budget, device=count.device) < count[:, None]


def rollout(
    model: Any,
    batch: Mapping[str, Any],
    budget: int,
    slot_inputs: Tensor | None = None,
    use_target: Tensor | None = None,
    detach_feedback: bool = False,
    bottleneck: Tensor | None = None,
) -> RolloutOutput:
    """Prompt, K latent slots, ``<|latent_end|>`` and answer, with gradients.

    Args:
        model: the (optionally PEFT-wrapped) model, see `storm_vlm.model.modeling`.
        batch: stock processor tensors of left-padded prompts that end in ``<|latent_start|>`` (budget 0: that
            do not), and ``labels`` (B, A), right-padded with -100. Without labels A is 1: the first answer token.
            ``slots`` (B,), at most K: a row's segment ends after so many. What follows neither attends to the
            others nor counts them.
        budget: K. 0 is the stock model's forward over prompt and answer.
        slot_inputs: (B, K, D) embeddings to feed instead of the model's own states (Stage I: the targets).
        use_target: bool, (B,) or (B, K), where ``slot_inputs`` are used, own states elsewhere; None: everywhere.
        detach_feedback: cut the gradient through the states that are fed back (an ablation, not the paper).
        bottleneck: (B,) bool, rows whose ``<|latent_end|>`` and answer do not attend to the video: they know it by
            the slots alone, and by text that has seen it. None: no row.

    Raises:
        LatentError: a prompt does not end as the budget asks, or ``slot_inputs`` has the wrong shape.
        UnknownNameError: the model's type has no adapter in `BACKBONES`.
        RuntimeError: see `read_prompt`.
    """
    model, slots = unwrap(model), batch.get("slots")
    known = slot_inputs is not None and use_target is None
    if budget == 0 or (known and bottleneck is None and slots is None):
        return _one_pass(model, batch, budget, slot_inputs)
    answer = embed(model, answer_ids(model, batch, budget))
    prompt, hidden = read_prompt(model, batch)

    def end(states: Tensor) -> RolloutOutput:
        """What follows slots that lie in the cache; `states` (B, K + 1, D), the first is the prompt's last."""
        follows = prompt if bottleneck is None else prompt.without_video(bottleneck)
        last = states[:, -1:]
        if slots is not None:
            follows = follows.after_slots(slots)
            last = torch.take_along_dim(states, slots[:, None, None], 1)
        tail = torch.cat([last, follows.extend(answer)], 1)
        return replace(_read_out(model, states[:, :-1], hidden[:, -2:-1], tail), slots=slots)

    if known and slot_inputs is not None:
        after = prompt.extend(_checked(slot_inputs, hidden, budget))
        return end(torch.cat([hidden[:, -1:], after], 1))
    given, pick = hidden, None
    if slot_inputs is not None and use_target is not None:
        given = _checked(slot_inputs, hidden, budget)
        pick = use_target.view(len(hidden), -1, 1).expand(-1, budget, -1)
    states, own, fed = [hidden[:, -1:]], [], hidden[:, -1:]
    for k in range(budget):
        if k:
            states.append(prompt.extend(fed))
        fed = states[k].detach() if detach_feedback else states[k].view_as(states[k])
        own.append(fed)
        if pick is not None:
            fed = torch.where(pick[:, k : k + 1], given[:, k : k + 1], fed)
    if bottleneck is None and slots is None:
        tail = prompt.extend(torch.cat([fed, answer], 1))
        output = _read_out(model, torch.cat(states, 1), hidden[:, -2:-1], tail)
    else:  # the last slot sees more than what follows
        output = end(torch.cat([*states, prompt.extend(fed)], 1))
    return output if detach_feedback else replace(output, fed=tuple(own))


def _one_pass(
    model: Any, batch: Mapping[str, Any], budget: int, slot_inputs: Tensor | None
) -> RolloutOutput:
    ids, base = batch["input_ids"], backbone(model)
    length = ids.shape[1]
    positions, mask = _positions(base, batch)
    answer = embed(model, answer_ids(model, batch, budget))
    prompt, clips = base.prompt_inputs(batch, added=budget + answer.shape[1])
    slots = prompt[:, :0] if slot_inputs is None else _checked(slot_inputs, prompt, budget)
    embeds = torch.cat([prompt, slots, answer], 1)
    added = embeds.shape[1] - length
    further = torch.arange(1, added + 1, device=ids.device)
    hidden = base.decode(
        embeds,
        torch.cat([positions, positions[..., -1:] + further], -1),
        None if mask is None else F.pad(mask, (0, added), value=1),
        **clips,
    )
    if budget == 0:
        return RolloutOutput(head(model, hidden[:, length - 1 :]), hidden[:, :0], None, None)
    states, tail = hidden[:, length - 1 : length + budget - 1], hidden[:, length + budget - 1 :]
    return _read_out(model, states, hidden[:, length - 2 : length - 1], tail)


@dataclass
class Prompt:
    """A prompt the decoder has read, and all that later passes need in order to continue it."""

    backbone: Backbone
    cache: DynamicCache
    mask: Tensor | None  # (B, T or more) where not all rows see all
    last_position: Tensor  # (..., B, 1)
    length: int  # T
    video: Tensor  # (B, T) bool

    def without_video(self, rows: Tensor | None = None) -> Prompt:
        """The same prompt, whose later passes do not attend to the video: in `rows` (B,) bool, by default in all.

        What it would be to drop the video's keys and values, as positions stay.

        Raises:
            LatentError: some layers keep the prompt as one state, which cannot forget the video.
        """
        return self._without(
            self.video if rows is None else self.video & rows[:, None], "the video"
        )

    def after_slots(self, slots: Tensor) -> Prompt:
        """The same prompt, whose later passes go on behind each row's first `slots` (B,) of what was appended.

        Raises:
            LatentError: some layers keep what was appended as one state, which cannot forget a part of it.
        """
        appended = self.cache.get_seq_length() - self.length
        more = torch.arange(appended, device=slots.device) >= slots[:, None]
        hidden = torch.cat([torch.zeros_like(self.video), more], 1)
        skipped = (appended - slots)[:, None]
        return replace(self._without(hidden, "slots"), last_position=self.last_position - skipped)

    def _without(self, hidden: Tensor, what: str) -> Prompt:
        """`hidden` (B, T or more) bool."""
        if any(self.cache.is_linear):
            raise LatentError(
                f"{type(self.backbone.model).__name__} has layers of linear attention, whose state cannot forget "
                f"{what}: leave this one out"
            )
        mask = hidden.new_ones(()) if self.mask is None else self._seen(hidden.shape[1]).bool()
        return replace(self, mask=(mask & ~hidden).long())

    def _seen(self, length: int) -> Tensor:
        """The mask up to this length: all that came later is seen."""
        assert self.mask is not None
        return F.pad(self.mask, (0, length - self.mask.shape[1]), value=1)

    def extend(self, embeds: Tensor) -> Tensor:
        """Append embeddings (B, n, D), return their states."""
        added = embeds.shape[1]
        past = self.cache.get_seq_length() - self.length  # appended so far
        mask = None if self.mask is None else self._seen(self.length + past + added)
        step = torch.arange(past + 1, past + added + 1, device=embeds.device)
        # These passes are short: checkpointing would save nothing, and drop the cache.
        with _on_every_layer(self.backbone.decoder, "gradient_checkpointing", False):
            return self.backbone.decode(embeds, self.last_position + step, mask, self.cache)

    def rewind(self) -> None:
        """Take away what was appended."""
        self.cache.crop(self.length - self.cache.get_seq_length())


def read_prompt(model: Any, batch: Mapping[str, Any]) -> tuple[Prompt, Tensor]:
    """Run the prompts through the decoder, not the output layer; also returns states (B, T, D).

    This is the one long pass of a rollout, and may be checkpointed: see `_RecordedLayer`.

    Raises:
        RuntimeError: no keys and values came out of it, or none that carry a gradient. The rollout's loss
            would be wrong without any error.
    """
    config, base, length = (
        model.config.get_text_config(),
        backbone(model),
        batch["input_ids"].shape[1],
    )
    positions, mask = _positions(base, batch)
    recorder, cache = DynamicCache(config=config), DynamicCache(config=config)
    in_parts = config._attn_implementation == SDPA_IN_PARTS and torch.is_grad_enabled()
    kinds = [_RecordedStates if linear else _RecordedLayer for linear in cache.is_linear]
    recorded_layers = [kind() for kind in kinds]
    recorder.layers[:] = recorded_layers
    embeds, clips = base.prompt_inputs(batch)
    with _on_every_layer(base.decoder, "_can_checkpoint_with_cache", True):
        hidden = base.decode(embeds, positions, mask, recorder, **clips)
    recorded = None
    for index, layer in enumerate(recorded_layers):
        recorded = layer.recorded
        if recorded is None or (kinds[index] is _RecordedLayer and recorded[0].shape[-2] != length):
            raise RuntimeError(f"layer {index} of the model dropped its keys and values")
        if kinds[index] is _RecordedStates:
            cache.layers[index] = StatesLayer(*recorded)
        elif in_parts:
            cache.layers[index] = PartsLayer(*recorded)
        else:
            cache.update(*recorded, index)
    if hidden.requires_grad and recorded is not None and not recorded[1].requires_grad:
        raise RuntimeError(
            "the prompt's keys and values carry no gradient: reentrant checkpointing cuts it; set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    video = batch["input_ids"] == base.video_token_id
    return Prompt(base, cache, mask, positions[..., -1:], length, video), hidden


class _RecordedLayer(DynamicLayer):
    """Keeps the keys and values of one pass, and of none after it.

    In backward, checkpointing runs a decoder layer a second time. What it then computes must go to the
    attention of that same run, and must not be appended to anything.
    """

    recorded: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.recorded is None:
            self.recorded = key_states, value_states
        return key_states, value_states


class _RecordedStates(LinearAttentionLayer):
    """The same for a layer of linear attention, whose past is its convolution's inputs and a state.

    It never says that it has a past, so that a second run begins as the first did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inputs: Tensor | None = None
        self.recorded: tuple[Tensor, Tensor] | None = None

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self._inputs = F.pad(conv_states, (size, 0))[..., -size:]
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        if self.recorded is None and self._inputs is not None:
            self.recorded = self._inputs, recurrent_states
        return recurrent_states


@contextmanager
def _on_every_layer(decoder: Any, name: str, value: bool) -> Iterator[None]:
    """Set a switch of transformers' checkpointed layers for a while."""
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            setattr(layer, name, was)


def _positions(base: Backbone, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Positions (..., B, T), and the mask unless nothing is padded (attention is faster without)."""
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise LatentError("prompts must be padded on the left: set tokenizer.padding_side = 'left'")
    return base.positions(batch), None if mask is None or bool(mask.all()) else mask


def answer_ids(model: Any, batch: Mapping[str, Any], budget: int) -> Tensor:
    """Ids (B, A) to feed: ``<|latent_end|>`` (if K > 0), then the answer but its last token."""
    ids, labels = batch["input_ids"], batch.get("labels")
    # What stands in for -100 is arbitrary: it lies to the right of all that counts.
    answer = ids[:, :0] if labels is None else labels[:, :-1].clamp_min(0)
    if budget == 0:
        return answer
    tokens = latent_tokens(model.config)
    if bool((ids[:, -1] != tokens.start).any()):
        raise LatentError("with a latent budget, prompts must end in <|latent_start|>")
    return torch.cat([torch.full_like(ids[:, :1], tokens.end), answer], 1)


def _read_out(model: Any, states: Tensor, before_start: Tensor, tail: Tensor) -> RolloutOutput:
    logits = head(model, torch.cat([before_start, tail], 1))
    return RolloutOutput(logits[:, 2:], states, logits[:, 0], logits[:, 1])


def _checked(slot_inputs: Tensor, like: Tensor, budget: int) -> Tensor:
    expected = (like.shape[0], budget, like.shape[-1])
    if tuple(slot_inputs.shape) != expected:
        raise LatentError(f"slot_inputs must be {expected}, got {tuple(slot_inputs.shape)}")
    return slot_inputs.to(like)


def embed(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)


def head(model: Any, states: Tensor) -> Tensor:
    return model.get_output_embeddings()(states)
