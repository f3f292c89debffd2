"""What a latent step costs: Stage I and Stage II against a plain SFT step, and against recomputing everything.

All kinds of step run on the same model and the same synthetic batch, in turn, round after round; what is
reported is the median over rounds of each round's ratio, so that a machine that grows slower or faster does
not decide. Weights are random: time and memory do not depend on them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.output import check_outputs
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.model.device import torch_device
from storm_vlm.model.latent import alignment_loss, answer_loss
from storm_vlm.model.modeling import enable_latents
from storm_vlm.model.rollout import RolloutOutput, rollout
from storm_vlm.training.train import choose_attention
from storm_vlm.versions import commit, versions

Shape = Literal["micro", "3b", "7b"]
Batch = dict[str, Tensor]
STEPS = ("sft", "stage1", "stage2", "naive")
ANSWER_TOKENS, TEXT_TOKENS = 8, 150
GRID = (24, 42)  # patches of a frame at 256 * 28 * 28 pixels and 16:9


def shape_config(shape: Shape) -> Any:
    """The configuration of a published size, or of the shipped micro backbone."""
    if shape == "micro":
        return AutoConfig.from_pretrained(shipped("backbone"))
    sizes = {
        "3b": (2048, 11008, 36, 16, 2, 151936, True),
        "7b": (3584, 18944, 28, 28, 4, 152064, False),
    }
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = sizes[shape]
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [16, 24, 24],
                "rope_theta": 1e6,
            },
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=tied,
    )


def random_model(config: Any, budget: int, device: str, dtype: torch.dtype) -> Any:
    """A model with latent tokens (the last rows of the table) and a frozen vision tower, as training has it."""
    config.latent_budget = budget
    first = config.text_config.vocab_size - 3
    for name, row in zip(("start", "pad", "end"), range(first, first + 3), strict=True):
        setattr(config, f"latent_{name}_token_id", row)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=choose_attention(None)[0]
        )
    model.model.visual.requires_grad_(False)
    return enable_latents(model).train()


def random_batch(config: Any, rows: int, prefix: int, device: str) -> Batch:
    """`rows` prompts of about `prefix` tokens: a video, a question, ``<|latent_start|>``; and answers."""
    per_grid = GRID[0] * GRID[1] // 4
    grids = max(1, round((prefix - TEXT_TOKENS) / per_grid))
    text = torch.randint(0, 256, (rows, TEXT_TOKENS))
    ends = [config.vision_start_token_id, config.vision_end_token_id, config.latent_start_token_id]
    opened, closed, start = (torch.full((rows, 1), token) for token in ends)
    video = torch.full((rows, grids * per_grid), config.video_token_id)
    ids = torch.cat([opened, video, closed, text, start], 1)
    vision = config.vision_config
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == config.video_token_id).long(),
        "pixel_values_videos": torch.randn(rows * grids * GRID[0] * GRID[1], values),
        "video_grid_thw": torch.tensor([[grids, *GRID]] * rows),
        "second_per_grid_ts": torch.ones(rows),
        "labels": torch.randint(0, 256, (rows, ANSWER_TOKENS)),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def naive_rollout(model: Any, batch: Mapping[str, Any], budget: int) -> RolloutOutput:
    """The rollout without a cache: for each slot, and for the answer, a pass over all that came before."""
    states: list[Tensor] = []
    nothing = model.get_input_embeddings()(batch["input_ids"][:, :1])
    for k in range(budget):
        # What is not known yet is not seen.
        slots = torch.cat([*states, *[nothing] * (budget - k)], 1)
        states.append(rollout(model, batch, budget, slots).states[:, k : k + 1])
    return rollout(model, batch, budget, torch.cat(states, 1))


def step_losses(
    model: Any, batch: Batch, without: Batch, budget: int
) -> dict[str, Callable[[], Tensor]]:
    """The loss of each kind of step. `without` is the batch without ``<|latent_start|>``, for SFT."""
    shape = (len(batch["labels"]), budget, model.config.get_text_config().hidden_size)
    targets = torch.randn(shape, device=batch["labels"].device)

    def stage1() -> Tensor:
        output = rollout(model, batch, budget, targets)
        return answer_loss(output.logits, batch["labels"]) + alignment_loss(output.states, targets)

    return {
        "sft": lambda: answer_loss(rollout(model, without, 0).logits, batch["labels"]),
        "stage1": stage1,
        "stage2": lambda: answer_loss(rollout(model, batch, budget).logits, batch["labels"]),
        "naive": lambda: answer_loss(naive_rollout(model, batch, budget).logits, batch["labels"]),
    }


def bench_train(
    shape: Shape,
    prefix: int,
    budget: int,
    batches: list[int],
    rounds: int,
    checkpointing: bool,
    device: str,
    results: Path | None,
) -> dict[str, Any]:
    """Time and peak memory of forward, backward and a fused AdamW step (fp32 states on a CPU, bf16 on a GPU).

    Args:
        prefix: prompt tokens, about.
        budget: K.
        batches: numbers of rows to try.
        results: JSON file for the record; None writes none.

    Returns:
        ``batch[rows]`` holds ``stage1_over_sft``, ``stage2_over_sft`` and ``naive_over_stage2`` (medians over
        rounds, with the smallest and the largest), ``memory_over_sft`` (Stage II) and ``peak_bytes`` of each
        kind (None on a CPU, which keeps no such count), and the median ``seconds`` of each kind of step.
    """
    torch.manual_seed(0)
    config = shape_config(shape)
    on_gpu = torch_device(device).type == "cuda"
    check_outputs([results], [])
    model = random_model(config, budget, device, torch.bfloat16 if on_gpu else torch.float32)
    if checkpointing:
        enable = "activation_checkpointing_enable"  # its name from transformers 5.24
        enable = enable if hasattr(model, enable) else "gradient_checkpointing_enable"
        getattr(model, enable)({"use_reentrant": False})
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6, fused=True)
    record: dict[str, Any] = {
        **machine(device),
        "shape": shape,
        "K": budget,
        "checkpointing": checkpointing,
        "rounds": rounds,
        "batch": {},
    }
    for rows in batches:
        batch = random_batch(config, rows, prefix, device)
        record["prefix_tokens"] = batch["input_ids"].shape[1]
        text = ("input_ids", "attention_mask", "mm_token_type_ids")
        without = {name: t[:, :-1] if name in text else t for name, t in batch.items()}
        losses = step_losses(model, batch, without, budget)
        seconds: dict[str, list[float]] = {name: [] for name in STEPS}
        peaks: dict[str, int] = {}
        for number in tqdm(range(rounds + 1), f"{rows} rows", leave=False):  # the first warms up
            for name in STEPS:
                taken, peaks[name] = _one_step(losses[name], optimizer, on_gpu)
                if number:
                    seconds[name].append(taken)
        record["batch"][str(rows)] = {
            "stage1_over_sft": ratio(seconds, "stage1", "sft"),
            "stage2_over_sft": ratio(seconds, "stage2", "sft"),
            "naive_over_stage2": ratio(seconds, "naive", "stage2"),
            "memory_over_sft": peaks["stage2"] / peaks["sft"] if on_gpu else None,
            "peak_bytes": peaks if on_gpu else None,
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        }
    if results is not None:
        write_json(results, record)
    return record


def _one_step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, on_gpu: bool
) -> tuple[float, int]:
    """Seconds, and the peak of bytes on the GPU."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else 0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of rounds: the median, the smallest and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> dict[str, float]:
    """The spread of each round's ratio of two kinds."""
    return spread([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])


def machine(device: str) -> dict[str, Any]:
    """What every record says of where and with what it was measured."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": psutil.getloadavg()[0],  # what waited for them before
        "versions": versions(),
        "commit": commit(),
    }
