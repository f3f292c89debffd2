"""What a training step costs, before weights are downloaded: tokens, parameters, FLOPs and memory.

Parameters are counted on a model without storage (torch's ``meta`` device), visual tokens by the stock video
processor on a clip without storage. The rest is derived from the layers, term by term; the tests compare it with what
a real step does and keeps. The vision tower is frozen; adapters are where `train` puts them by default.

FLOPs: two per multiply-add, of matrix products, the patch convolution and attention. Attention is the whole square of
queries and keys, as `torch.utils.flop_counter` has it; causal kernels skip up to half. Backward is two products for
each of forward, one where the weight is frozen, and 2.5 attentions (fused kernels compute the scores again).
Checkpointing repeats a layer's forward up to the last tensor that backward needs, i.e. without its ``down_proj``.

Activations: what autograd keeps from forward to backward, with attention by SDPA's fused kernels. The rows of a batch
are taken to differ in length: with the mask that padding needs, SDPA keeps the square as a mask, in every layer, and
keys and values repeated for each query head. The rollout's short passes are those of `attention.py`.

Not counted: the tower's pixels, rotary tables, temporaries within a layer, masks of checkpointed layers,
fragmentation, the CUDA context. Sharding follows the sources of accelerate and the documents of DeepSpeed, and was
not measured; nor was a GPU's peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoVideoProcessor

from storm_vlm.data.processor import FrameBound, video_grid
from storm_vlm.errors import InputError
from storm_vlm.model.checkpoint import checkpoint_path, loading
from storm_vlm.training.plan_request import PlanRequest


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; ``trainable`` includes adapters, ``total`` does not."""

    total: int
    vision: int
    decoder: int
    trainable: int


@dataclass(frozen=True)
class Step:
    """One optimizer step on one device: FLOPs of all its micro-batches; bytes by part and at their peak."""

    sequence: int  #: tokens of a row, from prompt to answer
    vision_flops: int  #: encoding the videos
    flops: int  #: in all
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    kv_cache: int  #: for the passes that extend the prompt: its keys and values, and their scores
    working: int  #: the layer in recomputation (checkpointing), the gathered ones (fsdp)
    peak: int  #: in one pass of one micro-batch, gradients come as activations go


@dataclass(frozen=True)
class Plan:
    """Costs of a run; ``steps`` has "SFT" and, with a latent budget, "Stage I" and "Stage II"."""

    grid: tuple[int, int, int]  #: patches of a clip: time, height, width
    visual_tokens: int
    parameters: Parameters
    steps: dict[str, Step]


def plan(backbone: str, request: PlanRequest) -> Plan:
    """Costs of `request` on a hub name or local folder, of which only the configs are read.

    Raises:
        CheckpointError, OSError: no such backbone.
        InputError: it is no Qwen2.5-VL.
    """
    backbone = checkpoint_path(backbone)
    with loading(backbone):
        config = AutoConfig.from_pretrained(backbone)
        video_processor = AutoVideoProcessor.from_pretrained(backbone)
    return plan_config(config, video_processor, request)


def plan_config(config: Any, video_processor: Any, request: PlanRequest) -> Plan:
    """`plan` for a config and a video processor at hand."""
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"plans are made for Qwen2.5-VL, not for {config.model_type!r}")
    size = None
    if request.max_pixels:
        size = FrameBound(video_processor, request.max_pixels).size(request.num_frames)
    grid = video_grid(video_processor, request.num_frames, request.height, request.width, size)
    costs = _Costs(config, request, grid)
    budget, answer = request.latent_budget, request.answer_tokens
    prompt = request.question_tokens + costs.visual_tokens
    # The output layer keeps its input if it trains, and a row's end is a view of the row's states.
    viewed = request.batch_size == 1 and not request.lora_rank
    steps = {"SFT": costs.step([_Pass(prompt + answer - 1, 0, viewed)], answer)}
    if budget:
        prompt += 1  # <|latent_start|>
        length = prompt + budget + answer  # <|latent_end|>, and the answer but its last token
        rows = budget + answer + 1  # open the segment, go on after each slot but the last, close it
        fed_back = [_Pass(1, prompt + k - 1) for k in range(1, budget)]
        tail = _Pass(answer + 1, prompt + budget - 1)
        steps["Stage I"] = costs.step([_Pass(length, 0, False)], rows)
        steps["Stage II"] = costs.step([_Pass(prompt), *fed_back, tail], rows)
    return Plan(costs.grid, costs.visual_tokens, costs.parameters, steps)


class _Pass(NamedTuple):
    """One run of the decoder over ``new`` tokens of a row, which also attend to ``past`` ones."""

    new: int
    past: int = 0
    output_kept: bool = True  #: the losses look at a slice of its output, not at copied rows

    @property
    def keys(self) -> int:
        return self.new + self.past


class _Costs:
    """A model without storage under a request; from it, the cost of any list of passes."""

    def __init__(self, config: Any, request: PlanRequest, grid: tuple[int, int, int]) -> None:
        self.request, self.grid = request, grid
        self.text, self.tower = config.get_text_config(), config.vision_config
        self.size = 2 if request.dtype == "bf16" else 4
        self.patches = math.prod(grid)
        self.visual_tokens = self.patches // self.tower.spatial_merge_size**2
        self.trains = not request.lora_rank  # the decoder's own weights
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        self.visual, layers = model.model.visual, model.model.language_model.layers
        self.count = len(layers)
        self.weights = _linear_weights(layers)
        linear = (module for module in layers.modules() if isinstance(module, nn.Linear))
        self.adapters = request.lora_rank * sum(sum(layer.weight.shape) for layer in linear)
        total, vision = _size(model), _size(self.visual)
        trainable = total - vision if self.trains else self.adapters
        self.parameters = Parameters(total, vision, total - vision, trainable)
        self.layer_weights = _size(layers[0])
        self.weights_apart = total - _size(layers) - _size(self.visual.blocks)  # in no layer

    def step(self, passes: Sequence[_Pass], rows: int) -> Step:
        """Cost of a step in which every row of the batch takes these passes and ``rows`` rows of logits."""
        request, batch = self.request, self.request.batch_size
        times = batch * request.accumulation
        vision = times * self._vision_flops()
        weights, gradients, optimizer = self._states()
        activations = batch * sum(map(self._pass_bytes, passes))
        # logits as they come, in float32, and their log softmax
        logits = batch * rows * self.text.vocab_size * (self.size + 8)
        kv_cache = batch * self._cache_bytes(passes)
        working, kept = self._working_bytes(passes[0]), activations + logits + kv_cache
        # Short passes run backward first: every weight has a gradient while the prompt's activations are all there.
        together = request.accumulation > 1 or len(passes) > 1
        both = gradients + kept if together else max(gradients, kept)
        return Step(
            sequence=max(one.keys for one in passes),
            vision_flops=vision,
            flops=vision + times * self._decoder_flops(passes, rows),
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            logits=logits,
            kv_cache=kv_cache,
            working=working,
            peak=weights + optimizer + working + both,
        )

    def _vision_flops(self) -> int:
        frames, height, width = self.grid
        tower = self.tower
        window = tower.window_size // tower.patch_size
        windows = _sum_of_squares(height, window) * _sum_of_squares(width, window)
        full = sum(index in tower.fullatt_block_indexes for index in range(tower.depth))
        area = frames * (full * (height * width) ** 2 + (tower.depth - full) * windows)
        weights = self.visual.patch_embed.proj.weight.numel() + _linear_weights(self.visual.blocks)
        merger = self.visual_tokens * _linear_weights(self.visual.merger)
        return 2 * (self.patches * weights + merger) + 4 * area * tower.hidden_size

    def _decoder_flops(self, passes: Sequence[_Pass], rows: int) -> int:
        """Forward, backward and recomputation."""
        hidden = self.text.hidden_size
        down = 0 if self.adapters else self.count * hidden * self.text.intermediate_size
        flops = 2 * rows * hidden * self.text.vocab_size * (2 + self.trains)
        for one in passes:
            linear, adapters = 2 * one.new * self.weights, 2 * one.new * self.adapters
            attention = 4 * self.count * one.new * one.keys * hidden
            forward = linear + adapters + attention
            flops += forward + linear * (1 + self.trains) + 2 * adapters + attention * 5 // 2
            if self._checkpointed(one):  # an adapter comes after down_proj
                flops += forward - 2 * one.new * down
        return flops

    def _checkpointed(self, one: _Pass) -> bool:
        return self.request.checkpointing and not one.past

    def _masked(self, one: _Pass) -> bool:
        """Padding, or several tokens after others: no kernel's own causality fits."""
        return self.request.batch_size > 1 or (one.past > 0 and one.new > 1)

    def _pass_bytes(self, one: _Pass) -> int:
        """Kept of a row's pass, but for the keys and values of a pass that extends the prompt."""
        hidden = self.text.hidden_size
        output = self.size * hidden * (one.output_kept + self.trains)
        last_norm = one.new * (4 * hidden + 4 + output)
        if self._checkpointed(one):
            return last_norm + self.count * one.new * self.size * hidden
        keys = 0 if one.past else self._key_bytes(one)
        return last_norm + self.count * (self._layer_bytes(one) + keys)

    def _layer_bytes(self, one: _Pass) -> int:
        """Kept of a row's pass by one layer, but for keys and values.

        Norms keep their float32 input; attention its queries, output and a float per query and head; the MLP gate,
        silu(gate) and up; layers that train, or have an adapter, their input. PEFT's adapters of a bf16 model are
        float32: each casts a copy of its input; in float32, those that read the same share it.
        """
        text = self.text
        hidden, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
        norms = 2 * (4 * hidden + 4 + self.size * hidden * self.trains)
        reads = 2 if self.trains or self.size == 4 else 6
        inputs = reads * hidden + inner + 7 * self.request.lora_rank
        mask = self.size * one.new * one.keys if self._masked(one) and not one.past else 0
        return one.new * (norms + 4 * heads + self.size * (2 * hidden + 3 * inner + inputs)) + mask

    def _key_bytes(self, one: _Pass) -> int:
        """Keys and values that a layer's attention keeps of a row's prompt."""
        text = self.text
        heads = text.num_attention_heads if self._masked(one) else text.num_key_value_heads
        return 2 * self.size * one.keys * text.hidden_size // text.num_attention_heads * heads

    def _cache_bytes(self, passes: Sequence[_Pass]) -> int:
        """Kept of a row by the passes that extend its prompt: see `attention.sdpa_in_parts`."""
        prompt, *extensions = passes
        if not extensions:
            return 0
        heads, key_heads = self.text.num_attention_heads, self.text.num_key_value_heads
        token = 2 * self.size * self.text.hidden_size // heads * key_heads
        kept = prompt.new * token
        for one in extensions:
            scores = heads * (4 + (self.size if self.size < 4 else 0))  # float32, and as multiplied
            mask = heads // key_heads if self._masked(one) else 0
            kept += (one.keys - prompt.new) * token + one.new * one.keys * (scores + mask)
        return kept * self.count

    def _working_bytes(self, prompt: _Pass) -> int:
        working = 0
        if self.request.checkpointing:
            layer = self._layer_bytes(prompt) + self._key_bytes(prompt)
            working += self.request.batch_size * layer
        if self.request.sharding == "fsdp":  # what is in no layer, one layer, and the next one
            working += self.size * (self.weights_apart + 2 * self.layer_weights)
        return working

    def _states(self) -> tuple[int, int, int]:
        """Bytes of weights, gradients and AdamW's states on one device.

        Trainer's ``bf16=True`` leaves weights in the dtype they were loaded in; gradients and AdamW's two states take
        theirs. In float32 are: PEFT's adapters; with accelerate's FSDP, all that is trainable; with DeepSpeed, the
        states and a copy of what is trainable. DDP copies gradients into buckets.
        """
        request, trainable = self.request, self.parameters.trainable
        frozen = (self.parameters.total + self.adapters - trainable) * self.size
        share = trainable // request.devices
        if request.sharding == "fsdp":
            return frozen // request.devices + 4 * share, 4 * share, 8 * share
        if request.sharding == "zero2":
            states = 12 if self.size == 2 else 8
            return frozen + self.size * trainable, self.size * share, states * share
        held = (self.size if self.trains else 4) * trainable
        return frozen + held, held * min(2, request.devices), 2 * held


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear_weights(module: nn.Module) -> int:
    """Weights of a module's linear layers: its multiply-adds for one token."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.weight.numel() for layer in layers)


def _sum_of_squares(length: int, window: int) -> int:
    """Of the parts that windows cut a side into."""
    return length // window * window**2 + (length % window) ** 2
