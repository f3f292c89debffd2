"""What a training step costs, before weights are downloaded: tokens, parameters, FLOPs and memory.

Parameters are counted on a model without storage (torch's ``meta`` device), visual tokens by the stock video
processor on a clip without storage. The rest is derived from the layers, term by term; the tests compare it with what
a real step does and keeps.

FLOPs: two per multiply-add, of matrix products, the patch convolution and attention. Attention is the whole square of
queries and keys, as `torch.utils.flop_counter` has it; causal kernels skip up to half. Backward is two products for
each of forward, one where the weight is frozen, and 2.5 attentions (fused kernels compute the scores again).
Checkpointing repeats a layer's forward up to the last tensor that backward needs, i.e. without its ``down_proj``.

Activations: what autograd keeps from forward to backward, with attention by SDPA's fused kernels (flash or memory
efficient; the CPU's flash kernel keeps the same): queries, keys, values, output and a float per query and head. The
MLP keeps gate, silu(gate) and up; a norm its float32 input; a linear layer with trainable weights its input. The rows
of a batch are taken to differ in length: with the mask that padding needs, SDPA keeps the square as a mask, in every
layer, and keys and values repeated for each query head. The rollout's short passes are those of `attention.py`.

Not counted: a frozen tower's pixels, rotary tables, temporaries within a layer, masks of checkpointed layers,
fragmentation, the CUDA context. Sharding follows the sources of accelerate and the documents of DeepSpeed, and was
not measured; nor was a GPU's peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoVideoProcessor

from storm_vlm.errors import InputError
from storm_vlm.model.checkpoint import checkpoint_path
from storm_vlm.training.plan_request import PlanRequest

# What a decoder layer's linear layers read; o_proj reads attention's output, which is kept in any case.
_READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "first norm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "second norm"),
    "down_proj": "product",
}


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
    vision_flops: int  #: encoding the videos, forward
    decoder_flops: int  #: decoder and output layer, forward
    backward_flops: int
    recompute_flops: int
    flops: int
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
        InputError: it is no Qwen2.5-VL, or LoRA fits no layer of it.
    """
    backbone = checkpoint_path(backbone)
    try:
        config = AutoConfig.from_pretrained(backbone)
        video_processor = AutoVideoProcessor.from_pretrained(backbone)
    except ValueError as error:
        raise InputError(f"{backbone} is no backbone: {error}") from error
    return plan_config(config, video_processor, request)


def plan_config(config: Any, video_processor: Any, request: PlanRequest) -> Plan:
    """`plan` for a config and a video processor at hand."""
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"plans are made for Qwen2.5-VL, not for {config.model_type!r}")
    costs = _Costs(config, request, video_grid(video_processor, request))
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


def video_grid(video_processor: Any, request: PlanRequest) -> tuple[int, int, int]:
    """Patches of one clip (time, height, width), by the processor, run on a clip without storage."""
    shape = request.num_frames, 3, request.height, request.width
    capped = getattr(video_processor, "cap_pixels_per_frame", None)
    options: dict[str, Any] = {"cap_pixels_per_frame": capped is not False}  # as the collator does
    if request.max_pixels:
        least = min(video_processor.size["shortest_edge"], request.max_pixels)
        options["size"] = {"shortest_edge": least, "longest_edge": request.max_pixels}
    clip = torch.empty(shape, dtype=torch.uint8, device="meta")
    options |= {"do_sample_frames": False, "return_tensors": "pt"}
    try:
        outputs = video_processor(videos=[clip], **options)
    except ValueError as error:
        size = f"{request.width} x {request.height}"
        raise InputError(f"frames of {size} cannot be resized: {error}") from error
    frames, height, width = outputs["video_grid_thw"][0].tolist()
    return frames, height, width


class _Pass(NamedTuple):
    """One run of the decoder over ``new`` tokens of a row, which also attend to ``past`` ones."""

    new: int
    past: int = 0
    output_kept: bool = True  #: the losses look at a slice of its output, not at copied rows

    @property
    def keys(self) -> int:
        return self.new + self.past


class _Layers:
    """Equal layers (the decoder's, or the tower's blocks) and what one row or clip costs in them."""

    def __init__(self, modules: Any, config: Any, heads: int, request: PlanRequest) -> None:
        self.modules, self.count = modules, len(modules)
        self.hidden, self.inner, self.heads = config.hidden_size, config.intermediate_size, heads
        self.size = _bytes(request)
        self.trains = any(parameter.requires_grad for parameter in modules.parameters())
        self.weights = _linear_weights(modules)
        self.last_weights = _linear_weights(modules, "down_proj")
        self.adapters = 0  # weights

    def flops(self, tokens: int, area: int, recompute: bool) -> tuple[int, int, int]:
        """Forward, backward, recompute; ``area`` is queries times keys, summed over the layers."""
        linear, adapters = 2 * tokens * self.weights, 2 * tokens * self.adapters
        attention = 4 * area * self.hidden
        forward = linear + adapters + attention
        backward = linear * (1 + self.trains) + 2 * adapters + attention * 5 // 2
        return forward, backward, (forward - 2 * tokens * self.last_weights) * recompute

    def kept(self, qkv: int, inputs: int) -> int:
        """Bytes per token and layer; ``qkv`` and the ``inputs`` of linear layers are numbers."""
        norms = 2 * (4 * self.hidden + 4) + 2 * self.size * self.hidden * self.trains
        attention = self.size * (qkv + self.hidden) + 4 * self.heads
        return norms + attention + self.size * (3 * self.inner + inputs)


class _Costs:
    """A model without storage under a request; from it, the cost of any list of passes."""

    def __init__(self, config: Any, request: PlanRequest, grid: tuple[int, int, int]) -> None:
        self.request, self.grid, self.size = request, grid, _bytes(request)
        self.text, self.tower = config.get_text_config(), config.vision_config
        self.patches = math.prod(grid)
        self.visual_tokens = self.patches // self.tower.spatial_merge_size**2
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        self.visual, layers = model.model.visual, model.model.language_model.layers
        self.patch_weights = self.visual.patch_embed.proj.weight.numel()
        model.requires_grad_(not request.lora_rank)
        if request.freeze_vision:
            self.visual.requires_grad_(False)
        self.decoder = _Layers(layers, self.text, self.text.num_attention_heads, request)
        self.blocks = _Layers(self.visual.blocks, self.tower, self.tower.num_heads, request)
        self.adapted = {
            name: linear
            for name, linear in layers.named_modules()
            if request.lora_rank and name.split(".")[-1] in request.lora_targets
        }
        if request.lora_rank and not self.adapted:
            raise InputError(f"the decoder has no layer named {' or '.join(request.lora_targets)}")
        widths = [linear.in_features + linear.out_features for linear in self.adapted.values()]
        self.decoder.adapters = request.lora_rank * sum(widths)
        if any(name.endswith("down_proj") for name in self.adapted):
            self.decoder.last_weights = 0  # its adapter comes after it
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trainable = _count(trained) + self.decoder.adapters
        self.trained_tensors = len(trained) + 2 * len(self.adapted)
        total, vision = _count(model.parameters()), _count(self.visual.parameters())
        self.parameters = Parameters(total, vision, total - vision, trainable)

    def step(self, passes: Sequence[_Pass], rows: int) -> Step:
        """Cost of a step in which every row of the batch takes these passes and ``rows`` rows of logits."""
        request, batch = self.request, self.request.batch_size
        vision, decoder = self._vision_flops(), self._decoder_flops(passes, rows)
        times = batch * request.accumulation
        backward, recompute = times * (vision[1] + decoder[1]), times * (vision[2] + decoder[2])
        weights, gradients, optimizer = self._states()
        activations = batch * (self._vision_bytes() + sum(map(self._decoder_bytes, passes)))
        # logits as they come, in float32, and their log softmax
        logits = batch * rows * self.text.vocab_size * (self.size + 8)
        kv_cache = batch * self._cache_bytes(passes)
        working, kept = self._working_bytes(passes[0]), activations + logits + kv_cache
        # Short passes run backward first: every weight has a gradient while the prompt's activations are all there.
        together = request.accumulation > 1 or len(passes) > 1
        both = gradients + kept if together else max(gradients, kept)
        return Step(
            sequence=max(one.keys for one in passes),
            vision_flops=times * vision[0],
            decoder_flops=times * decoder[0],
            backward_flops=backward,
            recompute_flops=recompute,
            flops=times * (vision[0] + decoder[0]) + backward + recompute,
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            logits=logits,
            kv_cache=kv_cache,
            working=working,
            peak=weights + optimizer + working + both,
        )

    def _vision_flops(self) -> tuple[int, int, int]:
        frames, height, width = self.grid
        tower = self.tower
        window = tower.window_size // tower.patch_size
        windows = _sum_of_squares(height, window) * _sum_of_squares(width, window)
        full = sum(index in tower.fullatt_block_indexes for index in range(tower.depth))
        area = frames * (full * (height * width) ** 2 + (tower.depth - full) * windows)
        forward, backward, again = self.blocks.flops(self.patches, area, self.request.checkpointing)
        embedding = 2 * self.patches * self.patch_weights
        merger = 2 * self.visual_tokens * _linear_weights(self.visual.merger)
        forward += embedding + merger
        if not self.blocks.trains:
            return forward, 0, 0
        return forward, backward + embedding + 2 * merger, again

    def _decoder_flops(self, passes: Sequence[_Pass], rows: int) -> list[int]:
        head = 2 * rows * self.text.hidden_size * self.text.vocab_size
        parts = [(head, head * (1 + self.decoder.trains), 0)]
        for one in passes:
            area = self.decoder.count * one.new * one.keys
            parts.append(self.decoder.flops(one.new, area, self._checkpointed(one)))
        return [sum(part) for part in zip(*parts, strict=True)]

    def _checkpointed(self, one: _Pass) -> bool:
        return self.request.checkpointing and not one.past

    def _masked(self, one: _Pass) -> bool:
        """Padding, or several tokens after others: no kernel's own causality fits."""
        return self.request.batch_size > 1 or (one.past > 0 and one.new > 1)

    def _block_bytes(self) -> int:
        """Kept by a patch in a block: rotated queries and keys, and all of the fused q, k, v for the values' sake."""
        hidden = self.blocks.hidden
        return self.blocks.kept(5 * hidden, 3 * hidden + self.blocks.inner)

    def _vision_bytes(self) -> int:
        """Kept of a clip by the tower, if it trains."""
        if not self.blocks.trains:
            return 0
        hidden = self.blocks.hidden
        block = self.size * hidden if self.request.checkpointing else self._block_bytes()
        merger = 4 * hidden + 4 + self.size * hidden * 4  # norm, linear, GELU, linear
        pixels = self.size * self.patch_weights // hidden
        return self.patches * (pixels + self.blocks.count * block + merger)

    def _decoder_bytes(self, one: _Pass) -> int:
        """Kept of a row's pass, but for the keys and values of a pass that extends the prompt."""
        hidden, trains = self.decoder.hidden, self.decoder.trains
        output = self.size * hidden * (one.output_kept + trains)
        last_norm = one.new * (4 * hidden + 4 + output)
        if self._checkpointed(one):
            return last_norm + self.decoder.count * one.new * self.size * hidden
        keys = 0 if one.past else self._key_bytes(one)
        return last_norm + self.decoder.count * self._layer_bytes(one) + keys

    def _layer_bytes(self, one: _Pass) -> int:
        """Kept of a row's pass by one layer, but for keys and values."""
        hidden = self.decoder.hidden
        inputs = 2 * hidden + self.decoder.inner if self.decoder.trains else self._adapter_inputs()
        mask = self.size * one.new * one.keys if self._masked(one) and not one.past else 0
        return one.new * self.decoder.kept(hidden, inputs) + mask

    def _adapter_inputs(self) -> int:
        """Numbers per token and layer: what adapters read, and what passes between their two factors.

        In float32, those that read the same share it. PEFT's adapters of a bf16 model are float32: each casts a copy.
        """
        first = [(name, linear) for name, linear in self.adapted.items() if name[:2] == "0."]
        read = {name.split(".")[-1]: linear.in_features for name, linear in first}
        if self.size == 4:
            read = {_READS[name]: width for name, width in read.items() if name in _READS}
        return sum(read.values()) + self.request.lora_rank * len(first)

    def _key_bytes(self, one: _Pass) -> int:
        """Keys and values that attention keeps of a row's prompt, in all layers."""
        heads = self.decoder.heads if self._masked(one) else self.text.num_key_value_heads
        width = self.decoder.hidden // self.decoder.heads * heads
        return 2 * self.size * one.keys * width * self.decoder.count

    def _cache_bytes(self, passes: Sequence[_Pass]) -> int:
        """Kept of a row by the passes that extend its prompt: see `attention.sdpa_in_parts`."""
        prompt, *extensions = passes
        if not extensions:
            return 0
        heads, key_heads = self.decoder.heads, self.text.num_key_value_heads
        token = 2 * self.size * self.decoder.hidden // heads * key_heads
        kept = prompt.new * token
        for one in extensions:
            scores = heads * (4 + (self.size if self.size < 4 else 0))  # float32, and as multiplied
            mask = heads // key_heads if self._masked(one) else 0
            kept += (one.keys - prompt.new) * token + one.new * one.keys * (scores + mask)
        return kept * self.decoder.count

    def _working_bytes(self, prompt: _Pass) -> int:
        working, layers, blocks = 0, self.decoder.modules, self.blocks.modules
        if self.request.checkpointing:
            layer = self._layer_bytes(prompt) + self._key_bytes(prompt) // self.decoder.count
            working += self.request.batch_size * max(layer, self.patches * self._block_bytes())
        if self.request.sharding == "fsdp":  # what is in no layer, one layer, and the next one
            apart = (
                self.parameters.total - _count(layers.parameters()) - _count(blocks.parameters())
            )
            working += self.size * (apart + 2 * _count(layers[0].parameters()))
        return working

    def _states(self) -> tuple[int, int, int]:
        """Bytes of weights, gradients and AdamW's states on one device.

        Trainer's ``bf16=True`` leaves weights in the dtype they were loaded in; gradients and AdamW's two states take
        theirs. In float32 are: PEFT's adapters; with accelerate's FSDP, all that is trainable; with DeepSpeed, the
        states and a copy of what is trainable. DDP copies gradients into buckets.
        """
        request, trainable = self.request, self.parameters.trainable
        frozen = (self.parameters.total + self.decoder.adapters - trainable) * self.size
        share = trainable // request.devices
        if request.sharding == "fsdp":
            return frozen // request.devices + 4 * share, 4 * share, 8 * share
        if request.sharding == "zero2":
            states = 12 if self.size == 2 else 8
            return frozen + self.size * trainable, self.size * share, states * share
        held = (4 if request.lora_rank else self.size) * trainable
        # and a float32 count of steps per tensor
        return frozen + held, held * min(2, request.devices), 2 * held + 4 * self.trained_tensors


def _bytes(request: PlanRequest) -> int:
    return 2 if request.dtype == "bf16" else 4


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _linear_weights(module: nn.Module, name: str = "") -> int:
    """Weights of a module's linear layers (those of that name): its multiply-adds for one token."""
    return sum(
        linear.weight.numel()
        for path, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and path.endswith(name)
    )


def _sum_of_squares(length: int, window: int) -> int:
    """Of the parts that windows cut a side into."""
    return length // window * window**2 + (length % window) ** 2
