"""Targets from the model itself: a slow average of its weights reads the thought video (`self_distilled`).

The vision tower's tokens say what is to be seen; the decoder's states also say what it makes of that. The teacher
reads a prompt with the thought video in place of the clip, and its last states over the video's tokens are
pooled to K vectors. (A video comes before its question, which these states therefore cannot know.) As the model
learns, so does its teacher, a little later; and with it moves what all its states have in common, which a whitening
from the first day would take for their content. So they are whitened anew on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from storm_vlm.data.collator import Question, StormCollator
from storm_vlm.data.row import Row
from storm_vlm.model.backbones import backbone, input_device, unwrap
from storm_vlm.model.latent import pool_targets, target_whitening, whiten_targets
from storm_vlm.model.rollout import read_prompt
from storm_vlm.training.config import ConfigError, Method

FILE = "teacher.safetensors"
WHITENING = ("whitening.mean", "whitening.matrix")  # their names in it
WHITENED_ON = 512  # rows, the first ones
WHITENED_EVERY = 100  # optimizer steps


def thought_question(row: Row) -> Row | Question:
    """The row's question about its thought video, if it has one."""
    thought = row.thought_video
    if thought is None:
        return row
    return Question(thought.path, row.question, start=thought.start, end=thought.end)


@dataclass(frozen=True)
class DistillationCollator:
    """A training batch, and the teacher's prompts (`teacher`). A row without a thought video is masked out."""

    student: StormCollator
    teacher: StormCollator

    def __call__(self, examples: Sequence[tuple[Row, None]]) -> dict[str, Any]:
        rows = [row for row, _ in examples]
        return {
            **self.student(rows),
            "target_mask": torch.tensor([row.thought_video is not None for row in rows]),
            "teacher": self.teacher.collate_prompts([thought_question(r) for r in rows], "off"),
        }


class SelfDistilledTeacher(TrainerCallback):
    """An exponential moving average of a model, and the targets it makes.

    Weights that do not train are the model's own, not copies: with adapters, a teacher costs next to nothing.

    Raises:
        ConfigError: `rows` holds no thought video.
    """

    def __init__(
        self, model: Any, collator: StormCollator, rows: Sequence[Row], method: Method
    ) -> None:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model: Any = copy.deepcopy(model, frozen).eval().requires_grad_(False)
        self.budget, self.decay = method.latent_budget, method.ema_decay
        self.normalization = method.target_normalization
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        # In float32, or a bfloat16 average would never move.
        self.average = {n: p.float() for n, p in self.model.named_parameters() if n in trained}
        self.collator = collator
        with_thought = [row for row in rows if row.thought_video is not None][:WHITENED_ON]
        self.sample = [thought_question(row) for row in with_thought]
        if not self.sample:
            raise ConfigError(
                "no row has a thought video, which target_source self_distilled needs: build them"
            )
        self._whiten()

    def targets(self, batch: Mapping[str, Tensor], slots: Tensor | None = None) -> Tensor:
        """(B, K, D) float32 for the prompts of `DistillationCollator`; of rows of fewer `slots` (B,) the first."""
        raw = self._pooled(batch, slots)
        return whiten_targets(raw, *self.whitening) if self.normalization == "whiten" else raw

    def _whiten(self) -> None:
        seen, device = [], input_device(self.model)
        for first in range(0, len(self.sample), 8):
            batch = self.collator.collate_prompts(self.sample[first : first + 8], "off")
            seen.append(self._pooled({n: t.to(device) for n, t in batch.items()}))
        self.whitening = target_whitening(torch.cat(seen))

    @torch.no_grad()
    def _pooled(self, batch: Mapping[str, Tensor], slots: Tensor | None = None) -> Tensor:
        core = unwrap(self.model)
        _, hidden = read_prompt(core, batch)
        of_video = batch["input_ids"] == backbone(core).video_token_id
        counts = [self.budget] * len(hidden) if slots is None else slots.tolist()
        pooled = [
            pool_targets(states[mask], count)
            for states, mask, count in zip(hidden, of_video, counts, strict=True)
        ]
        return torch.stack([F.pad(each, (0, 0, 0, self.budget - len(each))) for each in pooled])

    @torch.no_grad()
    def follow(self, model: Any) -> None:
        """One step of the average towards the model."""
        own = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach().float(), 1 - self.decay)
                own[name].copy_(self.average[name])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.follow(kwargs["model"])
        if self.normalization == "whiten" and state.global_step % WHITENED_EVERY == 0:
            self._whiten()

    def save(self, folder: Path) -> None:
        kept = self.average | dict(zip(WHITENING, self.whitening, strict=True))
        save_file({n: t.contiguous() for n, t in kept.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        kept = load_file(folder / FILE)
        mean, matrix = (kept.pop(name).to(input_device(self.model)) for name in WHITENING)
        self.whitening = mean, matrix
        own = dict(self.model.named_parameters())
        for name, tensor in kept.items():
            self.average[name].copy_(tensor)
            own[name].data.copy_(tensor)
