"""Plans against what real steps on small models do and keep, and against published sizes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_storm
from peft import LoraConfig, get_peft_model
from real_step import measure
from tiny import tiny_processor
from tiny_model import labels_for, left_pad, prompt, tiny_config
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLVideoProcessor

from storm_vlm.data.collator import Question, StormCollator
from storm_vlm.data.processor import video_grid
from storm_vlm.data.video import Clip
from storm_vlm.errors import StormError
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.model.attention import SDPA_IN_PARTS
from storm_vlm.model.backbones import unwrap
from storm_vlm.model.latent import alignment_loss, answer_loss, storm_loss
from storm_vlm.model.modeling import enable_latents
from storm_vlm.model.rollout import rollout
from storm_vlm.training.plan_request import PlanRequest
from storm_vlm.training.planning import Plan, Step, plan, plan_config
from storm_vlm.training.train import lora_targets
from storm_vlm.training.trainer import boundary_loss

GRID, BUDGET, TEXT, HIDDEN = (8, 8, 12), 4, 100, 128
# 16 frames of that grid, and the prompt of tiny_model.prompt: three tokens, two around the video, TEXT
REQUEST = PlanRequest(
    num_frames=16,
    width=168,
    height=112,
    max_pixels=168 * 112,
    question_tokens=TEXT + 5,
    answer_tokens=4,
    latent_budget=BUDGET,
    dtype="fp32",
)


def replace(request: PlanRequest, **changes: Any) -> PlanRequest:
    return PlanRequest(**(request.model_dump() | changes))


KINDS = ("SFT", "Stage I", "Stage II")


def config() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    made = tiny_config(
        hidden_size=HIDDEN,
        intermediate_size=320,
        num_hidden_layers=8,
        max_position_embeddings=4096,
        rope_parameters=rope,
    )
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 4,
        "depth": 3,
    }
    for name, value in vision.items():
        setattr(made.vision_config, name, value)
    return made


def model(request: PlanRequest) -> Any:
    torch.manual_seed(0)
    made: Any = enable_latents(Qwen2_5_VLForConditionalGeneration(config())).train()
    made.set_attn_implementation({"text_config": SDPA_IN_PARTS})
    if request.dtype == "bf16":
        made.to(torch.bfloat16)
    made.model.visual.requires_grad_(False)
    if request.lora_rank:
        settings = LoraConfig(r=request.lora_rank, target_modules=lora_targets(made))
        made = get_peft_model(made, settings).train()
    if request.checkpointing:
        inner = unwrap(made)
        enable = "activation_checkpointing_enable"
        getattr(inner, enable if hasattr(inner, enable) else "gradient_checkpointing_enable")()
    return made


def loss_of(net: Any, request: PlanRequest, kind: str) -> torch.Tensor:
    """The loss of one step: rows of unequal length where there are several."""
    rows = [
        prompt(seed, TEXT - seed, GRID, force=kind != "SFT") for seed in range(request.batch_size)
    ]
    batch = left_pad(rows) | {"labels": labels_for(3)[1:].repeat(2, 1)[: request.batch_size]}
    batch["pixel_values_videos"] = batch["pixel_values_videos"].to(unwrap(net).dtype)
    if kind == "SFT":
        return answer_loss(rollout(net, batch, 0).logits, batch["labels"])
    targets = torch.randn(request.batch_size, BUDGET, HIDDEN)
    output = rollout(net, batch, BUDGET, targets if kind == "Stage I" else None)
    answer = answer_loss(output.logits, batch["labels"]) + boundary_loss(net, output)
    weight = 0.1 if kind == "Stage I" else 0.0
    return storm_loss(answer, alignment_loss(output.states, targets), weight)


def measured(request: PlanRequest, kind: str) -> tuple[int, int]:
    net = model(request)
    with torch.autocast("cpu", torch.bfloat16, enabled=request.dtype == "bf16"):
        return measure(net, lambda: loss_of(net, request, kind))


@cache
def costs(case: str) -> Plan:
    request = replace(REQUEST, **CASES[case])
    return plan_config(config(), tiny_processor().video_processor, request)


def planned(request: PlanRequest, kind: str) -> Step:
    return plan_config(config(), tiny_processor().video_processor, request).steps[kind]


CASES: dict[str, dict[str, Any]] = {
    "frozen tower": {},
    "padded batch, checkpointed": {"batch_size": 2, "checkpointing": True},
    "bf16": {"dtype": "bf16"},
    "lora": {"lora_rank": 8},
    "lora, bf16, checkpointed": {"lora_rank": 8, "dtype": "bf16", "checkpointing": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_does_and_keeps_what_the_plan_says(case: str, kind: str) -> None:
    """Two shallow models stand for the eight layers."""
    step = costs(case).steps[kind]
    flops, kept = measured(replace(REQUEST, **CASES[case]), kind)
    assert step.flops == pytest.approx(flops, rel=0.01)
    assert step.activations + step.logits + step.kv_cache == pytest.approx(kept, rel=0.02)


STATES = [
    {},
    {"dtype": "bf16"},
    {"lora_rank": 8},
    {"lora_rank": 4, "dtype": "bf16"},
]


@pytest.mark.parametrize("changes", STATES)
def test_weights_gradients_and_optimizer_are_exact(changes: dict[str, Any]) -> None:
    request = replace(REQUEST, **changes)
    net, step = model(request), planned(request, "Stage II")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert step.weights == sum(parameter.nbytes for parameter in net.parameters())
    assert step.gradients == sum(gradient.nbytes for gradient in gradients)
    # but for a count of steps a tensor
    assert step.optimizer == sum(state.nbytes for state in states if state.ndim)
    costs = plan_config(config(), tiny_processor().video_processor, request)
    assert costs.parameters.trainable == sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("frames", [1, 7, 16])
@pytest.mark.parametrize("size", [(64, 64), (96, 171), (30, 240)])
def test_prompt_length_is_the_collators(frames: int, size: tuple[int, int]) -> None:
    processor = tiny_processor()
    clip = Clip(np.zeros((frames, *size, 3), np.uint8), np.arange(frames) / 2, "clip")
    batch = StormCollator(processor, frames, BUDGET).collate_prompts(
        [Question(clip, "Where?")], "force"
    )
    text = StormCollator(processor, frames, BUDGET).collate_prompts(
        [Question(None, "Where?")], "force"
    )
    request = PlanRequest(
        num_frames=frames,
        height=size[0],
        width=size[1],
        question_tokens=text["input_ids"].shape[1] - 1 + 2,  # no <|latent_start|>; around the video
        latent_budget=BUDGET,
        answer_tokens=3,
    )
    costs = plan_config(config(), processor.video_processor, request)
    assert list(costs.grid) == batch["video_grid_thw"][0].tolist()
    assert costs.visual_tokens == int((batch["mm_token_type_ids"] == 2).sum())
    assert costs.steps["Stage II"].sequence == batch["input_ids"].shape[1] + BUDGET + 3


def test_frames_share_the_token_limit_as_in_the_collator() -> None:
    processor = tiny_processor()
    processor.video_processor.cap_pixels_per_frame = None
    processor.video_processor.max_video_tokens = 64
    clip = Clip(np.zeros((16, 112, 112, 3), np.uint8), np.arange(16) / 2, "clip")
    grid = video_grid(processor.video_processor, 16, 112, 112)
    batch = StormCollator(processor, 16, 0).collate_prompts([Question(clip, "Where?")], "off")
    assert list(grid) == batch["video_grid_thw"][0].tolist()
    assert grid[1] * grid[2] < 64  # what 112 x 112 pixels would be


VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "window_size": 112, "patch_size": 14}
PUBLISHED = {  # hidden, inner, layers, heads, key/value heads, vocabulary, tied, tower's inner; billions
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420, 3.7546),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420, 8.2922),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456, 33.4527),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456, 73.4108),
}


def published(name: str) -> Qwen2_5_VLConfig:
    hidden, inner, layers, heads, pairs, vocabulary, tied, vision_inner, _ = PUBLISHED[name]
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
            "rope_theta": 1e6,
        },
    }
    vision = VISION | {
        "intermediate_size": vision_inner,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    costs = plan_config(published(name), Qwen2VLVideoProcessor(), LARGE)
    assert costs.parameters.total / 1e9 == pytest.approx(PUBLISHED[name][-1], abs=1e-4)
    assert costs.parameters.vision + costs.parameters.decoder == costs.parameters.total


LARGE = PlanRequest(max_pixels=256 * 28 * 28)


def test_the_7b_at_32_frames_costs_what_first_principles_say() -> None:
    """Against a count of its own: six FLOPs per weight and token, without looking at any layer."""
    costs = plan_config(published("7B"), Qwen2VLVideoProcessor(), LARGE)
    assert costs.grid == (16, 24, 42) and costs.visual_tokens == 4032
    step = costs.steps["SFT"]
    body = costs.parameters.decoder - 2 * 152064 * 3584
    attention = 4 * step.sequence**2 * 3584 * 28 * 3.5
    text = step.flops - step.vision_flops
    assert text == pytest.approx(6 * body * step.sequence + attention, rel=0.005)
    assert costs.steps["Stage II"].flops == pytest.approx(step.flops, rel=0.02)


def test_checkpointing_trades_memory_for_compute() -> None:
    plain = plan_config(published("7B"), Qwen2VLVideoProcessor(), LARGE).steps["SFT"]
    again = plan_config(
        published("7B"), Qwen2VLVideoProcessor(), replace(LARGE, checkpointing=True)
    ).steps["SFT"]
    assert again.activations < plain.activations / 5 and again.peak < plain.peak
    assert again.flops > 1.2 * plain.flops


def test_the_rollouts_prompt_goes_backward_last() -> None:
    """Every weight then has a gradient: Stage II's peak holds all of them and the prompt's activations."""
    net, order = model(REQUEST), []
    for layer in net.model.language_model.layers:
        layer.register_full_backward_pre_hook(
            lambda _, gradients: order.append(gradients[0].shape[1])
        )
    loss_of(net, REQUEST, "Stage II").backward()
    prompt_length = REQUEST.question_tokens + 192 + 1
    passes = [REQUEST.answer_tokens + 1, *[1] * (BUDGET - 1), prompt_length]
    assert order == [length for length in passes for _ in range(8)]
    sft, rolled = planned(REQUEST, "SFT"), planned(REQUEST, "Stage II")
    kept = sft.activations + sft.logits
    assert sft.peak == sft.weights + sft.optimizer + max(sft.gradients, kept)
    kept = rolled.activations + rolled.logits + rolled.kv_cache
    assert rolled.peak == rolled.weights + rolled.optimizer + rolled.gradients + kept


def test_accumulation_and_devices() -> None:
    one = planned(REQUEST, "SFT")
    four = planned(replace(REQUEST, accumulation=4), "SFT")
    assert four.flops == 4 * one.flops and four.activations == one.activations
    assert four.peak == one.peak + min(one.gradients, one.activations + one.logits)
    assert (
        planned(replace(REQUEST, devices=2), "SFT").gradients == 2 * one.gradients
    )  # DDP's buckets
    sharded = planned(replace(REQUEST, devices=4, sharding="fsdp"), "SFT")
    assert sharded.optimizer == pytest.approx(one.optimizer / 4, rel=0.001)
    assert sharded.weights == pytest.approx(one.weights / 4, rel=0.001) and sharded.working
    halved = planned(replace(REQUEST, devices=4, sharding="zero2", dtype="bf16"), "SFT")
    assert halved.weights == one.weights // 2 and halved.gradients == one.gradients // 8


def test_what_cannot_be_planned_says_why() -> None:
    with pytest.raises(StormError, match="not qwen2_5_vl_text"):
        plan_config(config().get_text_config(), tiny_processor().video_processor, REQUEST)
    with pytest.raises(StormError, match="frames of 2000 x 1 cannot be resized"):
        planned(replace(REQUEST, width=2000, height=1), "SFT")
    with pytest.raises(StormError, match="no such folder"):
        plan("./absent", REQUEST)
    assert list(plan(str(shipped("backbone")), replace(REQUEST, latent_budget=0)).steps) == ["SFT"]


def test_the_command_needs_only_configs(tmp_path: Path) -> None:
    for name in ("config.json", "processor_config.json"):
        shutil.copy(shipped("backbone") / name, tmp_path)
    options = ["--num-frames", "6", "--width", "64", "--height", "64", "--dtype", "fp32"]
    result = run_storm("plan", tmp_path, *options, "--json")
    assert result.exit_code == 0, result.output
    request = PlanRequest(num_frames=6, width=64, height=64, dtype="fp32")
    assert json.loads(result.stdout) == json.loads(json.dumps(asdict(plan(str(tmp_path), request))))
    shown = run_storm("plan", *options, "--lora-rank", 4, "--tflops", 1)
    assert shown.exit_code == 0, shown.output
    for text in ("48 visual tokens", "Stage II", "kv cache", "seconds"):
        assert text in shown.stdout
