"""What a training step costs, before weights are downloaded: tokens, parameters, FLOPs and memory.

Parameters are counted on a model without storage (torch's ``meta`` device), visual tokens by the stock video
processor on a clip without storage, FLOPs and activations by a step without storage (`dry_step`); the tests compare
all of them with what a real step does and keeps. The vision tower is frozen; adapters are where `train` puts them by
default.

FLOPs: two per multiply-add, of matrix products, convolutions and attention. Attention is the whole square of queries
and keys, as `torch.utils.flop_counter` has it; causal kernels skip up to half.

Activations: what autograd keeps from forward to backward, with attention by SDPA's fused kernels. The rows of a batch
are taken to differ in length: with the mask that padding needs, SDPA keeps the square as a mask, in every layer, and
keys and values repeated for each query head. The rollout's short passes are those of `attention.py`.

Not counted: the tower's activations, temporaries within a layer, fragmentation, the CUDA context. Sharding follows
the sources of accelerate and the documents of DeepSpeed, and was not measured; nor was a GPU's peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoVideoProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from storm_vlm.data.processor import FrameBound, blank_clip
from storm_vlm.model.backbones import backbone, supported
from storm_vlm.model.checkpoint import checkpoint_path, loading
from storm_vlm.training.dry_step import DryRun, Kind
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
    kv_cache: (
        int  #: for the passes that extend the prompt: its keys and values, and all that they keep
    )
    working: int  #: the layer in recomputation (checkpointing), the gathered ones (fsdp)
    peak: int  #: in one pass of one micro-batch, gradients come as activations go


@dataclass(frozen=True)
class Plan:
    """Costs of a run; ``steps`` has "SFT" and, with a latent budget, "Stage I" and "Stage II"."""

    #: patches of a clip: time, height, width; visual tokens, where the processor tells of no patches
    grid: tuple[int, int, int]
    visual_tokens: int
    parameters: Parameters
    steps: dict[str, Step]


def plan(backbone: str, request: PlanRequest) -> Plan:
    """Costs of `request` on a hub name or local folder, of which only the configs are read.

    Raises:
        CheckpointError, OSError: no such backbone.
        LatentError: its type has no adapter.
    """
    backbone = checkpoint_path(backbone)
    with loading(backbone):
        config = AutoConfig.from_pretrained(backbone)
        video_processor = AutoVideoProcessor.from_pretrained(backbone)
    return plan_config(config, video_processor, request)


def plan_config(config: Any, video_processor: Any, request: PlanRequest) -> Plan:
    """`plan` for a config and a video processor at hand."""
    supported(config.model_type)
    size = None
    if request.max_pixels:
        size = FrameBound(video_processor, request.max_pixels).size(request.num_frames)
    clip = blank_clip(video_processor, request.num_frames, request.height, request.width, size)
    run = DryRun(config, request, clip)
    prompt, answer = request.question_tokens + len(run.features), request.answer_tokens
    counts = _Memory(run)
    steps = {"SFT": counts.step("SFT", prompt + answer - 1)}
    if request.latent_budget:
        length = prompt + 1 + request.latent_budget + answer  # with both ends of the segment
        for kind in ("Stage I", "Stage II"):
            steps[kind] = counts.step(kind, length)
    grid = clip["video_grid_thw"][0].tolist() if "video_grid_thw" in clip else run.grid
    frames, height, width = grid
    return Plan((frames, height, width), len(run.features), counts.parameters, steps)


class _Memory:
    """What one device holds during the steps of a `DryRun`."""

    def __init__(self, run: DryRun) -> None:
        self.run, self.request = run, run.request
        self.size = 2 if run.request.dtype == "bf16" else 4
        total, vision = _size(run.whole), _size(backbone(run.whole).vision_tower)
        self.parameters = Parameters(total, vision, total - vision, run.trainable)
        layers = [m for m in run.whole.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.gathered = total - sum(map(_size, layers)) + 2 * max(map(_size, layers))

    def step(self, kind: Kind, sequence: int) -> Step:
        request, cost = self.request, self.run.cost(kind)
        vision = request.batch_size * request.accumulation * self.run.vision_flops
        weights, gradients, optimizer = self._states()
        working = self.run.layer_bytes(kind) if request.checkpointing else 0
        if request.sharding == "fsdp":  # what is in no layer, one layer, and the next one
            working += self.size * self.gathered
        kept = cost.activations + cost.logits + cost.kv_cache
        # Short passes run backward first: every weight has a gradient while the prompt's activations are all there.
        together = request.accumulation > 1 or kind == "Stage II"
        both = gradients + kept if together else max(gradients, kept)
        return Step(
            sequence=sequence,
            vision_flops=vision,
            flops=vision + request.accumulation * cost.flops,
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=cost.activations,
            logits=cost.logits,
            kv_cache=cost.kv_cache,
            working=working,
            peak=weights + optimizer + working + both,
        )

    def _states(self) -> tuple[int, int, int]:
        """Bytes of weights, gradients and AdamW's states on one device.

        Trainer's ``bf16=True`` leaves weights in the dtype they were loaded in; gradients and AdamW's two states take
        theirs. In float32 are: PEFT's adapters; with accelerate's FSDP, all that is trainable; with DeepSpeed, the
        states and a copy of what is trainable. DDP copies gradients into buckets.
        """
        request, trainable = self.request, self.parameters.trainable
        adapters = trainable if request.lora_rank else 0
        frozen = (self.parameters.total + adapters - trainable) * self.size
        share = trainable // request.devices
        if request.sharding == "fsdp":
            return frozen // request.devices + 4 * share, 4 * share, 8 * share
        if request.sharding == "zero2":
            states = 12 if self.size == 2 else 8
            return frozen + self.size * trainable, self.size * share, states * share
        held = (4 if adapters else self.size) * trainable
        return frozen + held, held * min(2, request.devices), 2 * held


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
