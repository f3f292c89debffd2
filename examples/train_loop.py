"""STORM's training as one flat loop, to be read: what `storm train` does, without Trainer, processes or checkpoints.

    python examples/train_loop.py BACKBONE ROWS.jsonl OUT

Stage I aligns the latent slots with the thought videos, Stage II trains the answer alone on the model's own
states (paper, section 3.3). A test compares its losses with the Trainer's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoProcessor, get_cosine_schedule_with_warmup

from storm_vlm import StormForConditionalGeneration, add_latent_tokens
from storm_vlm.data.collator import StormCollator, VideoInputs
from storm_vlm.data.row import Row, read_rows
from storm_vlm.model.latent import IGNORE_INDEX
from storm_vlm.model.rollout import RolloutOutput, rollout
from storm_vlm.model.tokens import latent_tokens
from storm_vlm.training.config import Method
from storm_vlm.training.targets import alignment_targets


@dataclass(frozen=True)
class Stage:
    steps: int
    learning_rate: float
    alignment_weight: float = 0.0
    feeds_targets: bool = (
        False  # targets into the slots, first all, then ever fewer; else own states
    )
    batch_size: int = 16
    warmup: int = 30


STAGE_1 = Stage(steps=480, learning_rate=3e-3, alignment_weight=0.1, feeds_targets=True)
STAGE_2 = Stage(steps=120, learning_rate=1e-4)


def slots(stage: Stage, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
    """What goes into the slots: targets until 55% of the stage, none of them from 85% on; own states elsewhere."""
    if not stage.feeds_targets:
        return {}
    share = min(1.0, max(0.0, (0.85 - progress) / 0.3))
    if share == 1:
        return {"slot_inputs": batch["targets"]}
    pick = torch.rand(batch["targets"].shape[:2]) < share
    return {"slot_inputs": batch["targets"], "use_target": pick}


def boundary_loss(model: Any, output: RolloutOutput) -> Tensor:
    """Open the segment, close it after slot K, and do not close it before."""
    start, _, end = latent_tokens(model.config)
    opened = -output.start_logits.log_softmax(-1)[:, start].mean()
    closed = -output.end_logits.log_softmax(-1)[:, end].mean()
    log_p = model.lm_head(output.states[:, 1:]).log_softmax(-1)  # (B, K - 1, V)
    log_p = log_p.index_fill(-1, torch.tensor([end]), float("-inf"))
    return (opened + closed) / 2 - log_p.logsumexp(-1).mean()


def step_loss(model: Any, stage: Stage, batch: dict[str, Tensor], progress: float) -> Tensor:
    """Cross-entropy of the answer + 0.1 x distance of states and targets + the segment's boundaries (Eq. 4)."""
    budget = model.config.latent_budget
    output = rollout(model, batch, budget, **slots(stage, batch, progress))
    loss = F.cross_entropy(
        output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX
    )
    if stage.alignment_weight:
        distance = (output.states - batch["targets"]).square().sum(-1).mean()
        loss = loss + stage.alignment_weight * distance
    return loss + boundary_loss(model, output)


def train_stage(
    model: Any, processor: Any, rows: list[Row], stage: Stage, num_frames: int, seed: int = 0
) -> list[float]:
    """Train in place, rows in their order; returns the loss of every step."""
    budget = model.config.latent_budget
    model.model.visual.requires_grad_(False)
    targets: Any = [None] * len(rows)
    if stage.alignment_weight:
        targets = alignment_targets(model, processor, rows, Method(latent_budget=budget))
    collator = StormCollator(
        processor, num_frames, budget, VideoInputs(processor, num_frames, cache_bytes=2**30)
    )
    loader = DataLoader(
        list(zip(rows, targets, strict=True)),  # type: ignore[arg-type]
        stage.batch_size,
        collate_fn=collator,
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = {name for name in trained if name.endswith("bias") or "norm" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained.items() if n not in plain], "weight_decay": 0.01},
            {"params": [trained[n] for n in trained if n in plain], "weight_decay": 0.0},
        ],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, stage.warmup, stage.steps)
    model.train()
    torch.manual_seed(seed)
    losses: list[float] = []
    while len(losses) < stage.steps:
        for batch in loader:
            loss = step_loss(model, stage, batch, len(losses) / stage.steps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == stage.steps:
                break
    return losses


def main(backbone: str, data: str, output: str) -> None:
    model = StormForConditionalGeneration.from_pretrained(backbone)
    processor = AutoProcessor.from_pretrained(backbone)
    add_latent_tokens(model, processor, budget=8)
    rows = [row for row in read_rows(data) if row.split == "train"]
    for name, stage in (("Stage I", STAGE_1), ("Stage II", STAGE_2)):
        losses = train_stage(model, processor, rows, stage, num_frames=6)
        sys.stdout.write(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}\n")
    model.save_pretrained(Path(output))
    processor.save_pretrained(Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
