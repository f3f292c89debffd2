"""One trainer for every stage: what a stage is, its `Method` says (paper sec. 3.3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from storm_vlm.data.collator import StormCollator
from storm_vlm.data.schema import Row
from storm_vlm.latent import alignment_loss, answer_loss, slot_cosine, storm_loss
from storm_vlm.rollout import RolloutOutput, head, rollout, unwrap
from storm_vlm.tokens import latent_tokens
from storm_vlm.training.config import Method

Item = tuple[Row, Tensor | None]


class RowDataset(Dataset[Item]):
    """Rows with their targets; the collator reads the videos."""

    def __init__(self, rows: Sequence[Row], targets: Sequence[Tensor | None] | None = None) -> None:
        self.rows = rows
        self.targets = targets if targets is not None else [None] * len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self.rows[index], self.targets[index]


def collate_items(collator: StormCollator, items: Sequence[Item]) -> dict[str, Tensor]:
    """Items of a `RowDataset` -> a training batch."""
    rows, targets = zip(*items, strict=True)
    return collator(rows, targets)


class StormTrainer(Trainer):
    """transformers' Trainer with the paper's losses."""

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        # The loss is a mean over the micro-batch; without this, Trainer would take it for a sum.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Eq. 4: answer loss + weight * alignment loss (+ cross-entropy on the segment's boundaries)."""
        method = self.method
        progress = self.state.global_step / max(1, self.state.max_steps)
        output = storm_rollout(model, inputs, method, progress)
        loss = answer = answer_loss(output.logits, inputs["labels"])
        self._note("answer_loss", answer)
        targets = inputs.get("targets")
        if method.latent_budget:
            loss = loss + method.boundary_weight * boundary_loss(model, output)
            for k, norm in enumerate(output.states.detach().float().norm(dim=-1).mean(0)):
                self._note(f"slot_norm/{k + 1}", norm)
        if method.latent_budget and targets is not None:
            mask = inputs["target_mask"]
            alignment = alignment_loss(output.states, targets, mask, method.alignment_reduction)
            loss = storm_loss(loss, alignment, method.alignment_weight)
            self._note("alignment_loss", alignment)
            for k, cosine in enumerate(slot_cosine(output.states[mask], targets[mask])):
                self._note(f"slot_cosine/{k + 1}", cosine)
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics.clear()
        super().log(
            {**logs, **{name: round(value, 5) for name, value in means.items()}}, *args, **kwargs
        )

    def _note(self, name: str, value: Tensor) -> None:
        if torch.is_grad_enabled():
            self._metrics[name].append(value.item())


class LossBar(ProgressCallback):
    """The progress bar with the losses at its end, instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        losses = {name: value for name, value in (logs or {}).items() if name.endswith("_loss")}
        if self.training_bar is not None:
            self.training_bar.set_postfix(losses)


def target_share(progress: float) -> float:
    """Share of slots fed with targets under `scheduled`: all of them in the first half of a stage, then ever
    fewer, none at the end. `progress` is 0 … 1."""
    return min(1.0, 2 - 2 * progress)


def storm_rollout(
    model: Any, inputs: dict[str, Tensor], method: Method, progress: float = 0.0
) -> RolloutOutput:
    """The rollout with slots fed as `method.slot_input` says."""
    budget, targets = method.latent_budget, inputs.get("targets")
    slot_inputs = use_target = None
    if budget and method.slot_input == "pause":
        pad = torch.full_like(inputs["labels"][:, :1], latent_tokens(model.config).pad)
        slot_inputs = model.get_input_embeddings()(pad).expand(-1, budget, -1)
    elif budget and method.slot_input in ("target", "scheduled"):
        share = target_share(progress) if method.slot_input == "scheduled" else 1.0
        if targets is None:
            raise ValueError(
                f"slot_input={method.slot_input!r} feeds targets, but no row of this batch has a thought video"
            )
        slot_inputs, mask = targets, inputs["target_mask"]
        if share < 1 or not bool(mask.all()):
            use_target = (torch.rand(targets.shape[:2], device=mask.device) < share) & mask[:, None]
    return rollout(
        model, inputs, budget, slot_inputs, use_target, detach_feedback=method.detach_feedback
    )


def boundary_loss(model: Any, output: RolloutOutput) -> Tensor:
    """Cross-entropy of the segment's visible choices: open it, go on K - 1 times, close it after slot K.

    The answer-only loss of the paper would never teach the model to open a segment, which its inference
    ("once <|latent_start|> is generated") relies on; and with a loss on the end alone the model closes the
    segment after a slot or two, because nothing tells it not to. "Go on" is any token but the end.
    """
    tokens = latent_tokens(model.config)
    assert output.start_logits is not None and output.end_logits is not None  # there are slots
    logits = torch.stack([output.start_logits, output.end_logits], 1).float()  # (B, 2, V)
    wanted = torch.tensor([tokens.start, tokens.end], device=logits.device).expand(len(logits), -1)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    if output.states.shape[1] > 1:  # the state after slot k is the one fed into slot k + 1
        between = head(unwrap(model), output.states[:, 1:]).float()  # (B, K - 1, V)
        others = between.index_fill(-1, wanted[0, 1:], float("-inf"))
        loss = loss + (between.logsumexp(-1) - others.logsumexp(-1)).mean()
    return loss
