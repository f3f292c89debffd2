"""A training step on tensors without storage: what it does and keeps, counted while it runs.

torch's fake tensors have a shape and a type, and no numbers. The rollout, the losses and their backward run on them
as on a CPU, so that nothing need be known of a backbone but its adapter. What a model looks at (ids, masks, grids) is
real.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForImageTextToText

from storm_vlm.model.attention import SDPA_IN_PARTS
from storm_vlm.model.backbones import backbone, unwrap
from storm_vlm.model.latent import alignment_loss, answer_loss, storm_loss
from storm_vlm.model.modeling import enable_latents
from storm_vlm.model.rollout import rollout
from storm_vlm.model.tokens import has_latent_tokens, latent_tokens
from storm_vlm.training.flops import FlopCounter
from storm_vlm.training.plan_request import PlanRequest
from storm_vlm.training.train import lora_targets
from storm_vlm.training.trainer import boundary_loss

Kind = Literal["SFT", "Stage I", "Stage II"]


@dataclass(frozen=True)
class Cost:
    """Of a pass forward and backward of one batch: FLOPs, and bytes that autograd keeps in between."""

    flops: int
    activations: int
    kv_cache: int  #: of the passes that extend the prompt, what they keep themselves included
    logits: int

    def further(self, longer: Cost, times: int) -> Cost:
        """This, and `times` what `longer` costs more."""
        pairs = zip(vars(self).values(), vars(longer).values(), strict=True)
        return Cost(*(ours + times * (theirs - ours) for ours, theirs in pairs))


class _Dry(FlopCounter):
    """An operation with a fake tensor is fake, any other is done."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def compute(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if FakeTensor not in types:
            return func(*args, **kwargs)
        if func.overloadpacket in INDEXED:
            args = (args[0], [part for index in args[1] for part in _places(index)], *args[2:])
        return self.fake.__torch_dispatch__(func, types, args, kwargs)


class DryRun:
    """A backbone's steps under a request. `clip`: what its video processor makes of a clip, of which shapes count."""

    def __init__(self, config: Any, request: PlanRequest, clip: Mapping[str, Tensor]) -> None:
        self.config, self.request = copy.deepcopy(config), request
        if not has_latent_tokens(self.config):
            for number, name in enumerate(("start", "pad", "end"), 1):
                token = self.config.get_text_config().vocab_size - number
                setattr(self.config, f"latent_{name}_token_id", token)
        self.config.latent_budget = request.latent_budget
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.whole: Any = AutoModelForImageTextToText.from_config(self.config)
        self.stacks, self.turn, self.times = self._stacks()
        base = backbone(self.stacks[0])
        shape = clip["pixel_values_videos"].shape
        if base.pixels == "pixel_values":  # a clip is so many pictures
            shape = shape[1:]
        with _Dry(self.fake) as dry, torch.no_grad():
            with self.fake:
                pixels = torch.empty(shape, dtype=unwrap(self.stacks[0]).dtype)
            self.features = base.encode({**clip, base.pixels: pixels})
            self.grid = tuple(base.visual_tokens(self.features, clip).shape[:3])
        self.vision_flops: int = dry.flops  #: encoding one clip
        counts = [
            sum(p.numel() for p in net.parameters() if p.requires_grad) for net in self.stacks
        ]
        self.trainable: int = counts[0] + self.times * (counts[-1] - counts[0])

    def cost(self, kind: Kind) -> Cost:
        """Of one batch."""
        costs = [self._run(stack, kind, self.request.checkpointing) for stack in self.stacks]
        return costs[0].further(costs[-1], self.times)

    def layer_bytes(self, kind: Kind) -> int:
        """What a decoder layer keeps of a batch's prompt, were it not checkpointed: their mean."""
        kept = [self._run(stack, kind, False).activations for stack in self.stacks]
        return (kept[-1] - kept[0] if self.times else kept[0]) // self.turn

    def _stacks(self) -> tuple[list[Any], int, int]:
        """Models that stand for the whole one, as each layer costs what the next does, or each turn of a pattern.

        A shallow one and one with a further turn; the layers of a turn; and the turns that the shallow one lacks.
        """
        text = self.config.get_text_config()
        depth, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or []
        turn = next(n for n in range(1, depth + 1) if kinds[n:] == kinds[:-n])
        for first in (depth % turn + turn, depth % turn + 2 * turn):  # it may begin otherwise
            times = (depth - first) // turn
            if times > 0:
                stacks = [self._stack(first), self._stack(first + turn)]
                one, more = map(_base_parameters, stacks)
                if one + times * (more - one) == _base_parameters(self.whole):
                    return stacks, turn, times
        return [self._stack(depth)], depth, 0

    def _stack(self, depth: int) -> Any:
        """The model with so many decoder layers, as it is trained."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
        dtype = torch.bfloat16 if self.request.dtype == "bf16" else torch.float32
        with torch.device("meta"):  # no weights are drawn
            net: Any = enable_latents(AutoModelForImageTextToText.from_config(config, dtype=dtype))
            net.set_attn_implementation({"text_config": SDPA_IN_PARTS})
            backbone(net).vision_tower.requires_grad_(False)
            if self.request.lora_rank:
                adapters = LoraConfig(r=self.request.lora_rank, target_modules=lora_targets(net))
                net = get_peft_model(net, adapters)
        with self.fake:
            net.to_empty(device="cpu")
            unwrap(net).tie_weights()
        return net.train()

    def _run(self, net: Any, kind: Kind, checkpointing: bool) -> Cost:
        """A step of one batch, forward and backward."""
        base = backbone(net)
        _checkpoint(base.model, checkpointing)
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        vocabulary = self.config.get_text_config().vocab_size
        kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        logits: dict[int, int] = {}
        marks: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
                if tensor.shape[-1:] == (vocabulary,):
                    logits[storage._cdata] = storage.nbytes()
            return tensor

        def size() -> int:
            return sum(storage.nbytes() for storage in kept.values())

        hook = base.decoder.register_forward_hook(lambda *_: marks.append(size()))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.request.dtype == "bf16")
        with _Dry(self.fake) as dry:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                loss = self._loss(net, kind)
            whole = size()
            loss.backward()
        hook.remove()
        net.zero_grad(set_to_none=True)
        segment, scores = marks[-1] - marks[0], sum(logits.values())
        return Cost(dry.flops, whole - segment - scores, segment, scores)

    def _loss(self, net: Any, kind: Kind) -> Tensor:
        request, config = self.request, self.config
        budget = 0 if kind == "SFT" else request.latent_budget
        video = torch.full((len(self.features),), backbone(net).video_token_id)
        text = torch.zeros(request.question_tokens, dtype=torch.long)
        start = torch.tensor([latent_tokens(config).start] if budget else [], dtype=torch.long)
        ids = torch.cat([text[:1], video, text[1:], start]).repeat(request.batch_size, 1)
        mask = torch.ones_like(ids)
        mask[1:, 0] = 0  # rows of unequal length
        labels = torch.zeros(request.batch_size, request.answer_tokens, dtype=torch.long)
        features = self.features.repeat(request.batch_size, 1)
        # Without grids, positions are those of text: they cost the same.
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "video_features": features,
            "labels": labels,
        }
        if kind == "SFT":
            return answer_loss(rollout(net, batch, 0).logits, labels)
        targets = torch.zeros(request.batch_size, budget, config.get_text_config().hidden_size)
        output = rollout(net, batch, budget, targets if kind == "Stage I" else None)
        answer = answer_loss(output.logits, labels) + boundary_loss(net, output)
        if kind == "Stage II":
            return answer
        return storm_loss(answer, alignment_loss(output.states, targets), 0.1)


def _base_parameters(net: Any) -> int:
    return sum(p.numel() for name, p in net.named_parameters() if "lora_" not in name)


def _checkpoint(model: Any, on: bool) -> None:
    """transformers 5.24 renamed it."""
    verb = "enable" if on else "disable"
    new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
    getattr(model, new if hasattr(model, new) else old)()


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A real mask as the numbers of its places: how many these are is a shape."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    return index.nonzero(as_tuple=True)


INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
