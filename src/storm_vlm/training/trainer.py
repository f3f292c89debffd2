"""One trainer for every stage: what a stage is, its `Method` says (paper sec. 3.3)."""

from __future__ import annotations

import functools
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from storm_vlm.data.row import Row
from storm_vlm.errors import InputError, StormError
from storm_vlm.model.backbones import unwrap
from storm_vlm.model.latent import (
    IGNORE_INDEX,
    alignment_loss,
    answer_loss,
    storm_loss,
)
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.rollout import RolloutOutput, head, rollout
from storm_vlm.model.tokens import latent_tokens
from storm_vlm.training.checkpoints import SaveError, seal
from storm_vlm.training.config import ConfigError, Method
from storm_vlm.training.distillation import SelfDistilledTeacher
from storm_vlm.training.optimizer import muon_and_nadamw
from storm_vlm.training.row_lengths import LengthSampler
from storm_vlm.training.targets import Targets

TERMS = ("answer_loss", "boundary_loss", "alignment_loss")  # as `batch_counts` counts them


class DivergedError(StormError, ValueError):
    """A loss or a weight that is no number; names the step."""


class RowDataset(Dataset[tuple[Row, Tensor | None]]):
    """Rows with their targets (K, D); the collator reads the videos."""

    def __init__(self, rows: Sequence[Row], targets: Targets | None = None) -> None:
        self.rows, self.targets = rows, targets
        # A teacher makes its targets from thought videos, later.
        thoughts = all(row.thought_video is not None for row in rows)
        self.all_have_targets = thoughts if targets is None else targets.complete

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Row, Tensor | None]:
        return self.rows[index], None if self.targets is None else self.targets[index]


class StormTrainer(Trainer):
    """transformers' Trainer with the paper's losses.

    Whatever the number of processes and of accumulated batches, a step's loss is that of all its rows as one
    batch: every term is a sum over this process's share, divided by the count over all of them.

    Args:
        muon: settings of timm's Muon; None: the optimizer of the arguments.
        teacher: makes a batch's targets; None: they come with the rows.
        lengths: of the training rows, which are then grouped by them.
        samples: (model, step) -> metrics, at evaluations.

    Raises:
        ConfigError: Muon, or a teacher, for a sharded model.
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        muon: dict[str, Any] | None = None,
        teacher: SelfDistilledTeacher | None = None,
        lengths: Sequence[int] = (),
        samples: Callable[[Any, int], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.muon, self.teacher = method, muon, teacher
        self.lengths, self.samples = list(lengths), samples
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if muon is not None and sharded:
            raise ConfigError("muon needs whole matrices, not shards: use DDP, or leave it out")
        if teacher is not None and sharded:
            raise ConfigError(
                "target_source self_distilled keeps a second model whole on every process: use DDP, with lora if it "
                "does not fit"
            )
        if teacher is not None:
            self.add_callback(teacher)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LossBar)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the whole step's counts
        self._metrics: defaultdict[str, list[Tensor]] = defaultdict(list)
        # Of each batch, (2, 3): the sums of the terms, and their counts.
        self._evaluated: list[Tensor] = []
        self._parts = 1  # in how many batches a step's loss is a sum
        self._checked = False  # that latents are alive
        # Whether a pass has all its slot inputs beforehand must be the same on every process, or they
        # would wait for each other; so the whole data set decides, not a batch.
        rows = self.train_dataset if isinstance(self.train_dataset, RowDataset) else None
        self._all_have_targets = rows is not None and rows.all_have_targets
        asked = [d for d in (self.train_dataset, self.eval_dataset) if isinstance(d, RowDataset)]
        self._own_slots = any(row.slots is not None for d in asked for row in d.rows)
        if self.args.n_gpu > 1:
            raise InputError("several GPUs in one process: start with `accelerate launch` instead")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.lengths:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSampler(self.lengths, rows, seed, lambda: int((self.state.epoch or 0) + 1e-6))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.muon is not None and self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = muon_and_nadamw(trained, self.args, self.muon)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch's share of the loss, after its backward pass; raises DivergedError where it is no number."""
        loss = super().training_step(*args, **kwargs)
        if not bool(loss.isfinite()):
            raise self._diverged(f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        return loss

    def check_weights(self) -> None:
        """Raises DivergedError if a trained weight is no number: such a model must not be saved."""
        for name, parameter in unwrap(self.model).named_parameters():
            shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.requires_grad and not bool(shard.detach().isfinite().all()):
                raise self._diverged(f"after step {self.state.global_step}, {name} is not finite")

    def _diverged(self, finding: str) -> DivergedError:
        return DivergedError(
            f"{finding}: training has diverged; it was stopped, and these weights are not saved. Lower "
            f"training.learning_rate (now {self.args.learning_rate:g}) or warm up, and choose another output_dir"
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """In their order; stock `group_by_length` would look for token ids in the rows."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Losses on the validation rows, own states in the slots; and sample answers, unless the model is sharded."""
        metrics = super().evaluate(*args, **kwargs)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.samples is not None and self.args.should_save and not sharded:
            answered = self.samples(self.model, self.state.global_step)
            self.log(answered)
            metrics |= answered
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of all rows as one batch, whatever the batches and processes."""
        self._evaluated = []
        output: Any = super().evaluation_loop(*args, **kwargs)
        total: Any = self.accelerator.reduce(torch.stack(self._evaluated).sum(0), "sum")
        sums, counts = total
        answer, boundary, alignment = (sums / counts.clamp_min(1)).tolist()
        loss = answer + self.method.boundary_weight * boundary
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = (
            loss + self.method.alignment_weight * alignment
        )
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[None, None, None]:
        """Keeps the sums and counts of the loss's terms over a batch, instead of a mean."""
        batch = self._without_repeats(self._prepare_inputs(inputs))
        counts = batch_counts(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            ones = torch.ones_like(counts)
            losses = model(compute=lambda core: self._losses(core, batch, ones, progress=1.0))
        sums = [losses.get(term, counts.new_zeros(())).float() for term in TERMS]
        self._evaluated.append(torch.stack([torch.stack(sums), counts.float()]))
        return None, None, None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of one step, and what its losses are divided by: see `batch_counts`."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        batches[-1:] = [self._without_repeats(batch) for batch in batches[-1:]]
        self._parts = len(batches) * self.accelerator.num_processes
        counts = torch.stack([batch_counts(batch) for batch in batches]).sum(0) if batches else None
        if counts is not None:
            counts = self.accelerator.reduce(counts.to(self.args.device), "sum")
        return batches, counts

    def _without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Repeated rows count for nothing: with them, accelerate fills up the last batches of an epoch."""
        loader, labels = self.accelerator.gradient_state, batch["labels"]
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return batch
        # Behind each other, the processes' batches begin with the rows that are left.
        row = torch.arange(len(labels), device=labels.device)
        repeated = row + self.args.process_index * len(labels) >= loader.remainder
        batch = {**batch, "labels": labels.masked_fill(repeated[:, None], IGNORE_INDEX)}
        if "target_mask" in batch:
            batch["target_mask"] = batch["target_mask"] & ~repeated
        return batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Eq. 4: answer loss + weight * alignment loss (+ cross-entropy on the segment's boundaries)."""
        alone = num_items_in_batch is None or num_items_in_batch.ndim == 0  # a batch by itself
        counts = batch_counts(inputs) if alone else num_items_in_batch
        assert counts is not None
        progress = self.state.global_step / max(1, self.state.max_steps)
        if self.teacher is not None and torch.is_grad_enabled():
            targets = self.teacher.targets(inputs["teacher"], inputs.get("slots"))
            inputs = {**inputs, "targets": targets}
        losses = model(compute=lambda core: self._losses(core, inputs, counts, progress))
        # DDP and FSDP take the mean over processes of what must be the sum.
        loss = losses["loss"] * (1 if alone else self.accelerator.num_processes)
        return (loss, {}) if return_outputs else loss

    def _losses(
        self, core: Any, inputs: dict[str, Tensor], counts: Tensor, progress: float
    ) -> dict[str, Tensor]:
        method, (tokens, rows, aligned) = self.method, counts
        if self._own_slots and method.latent_budget and "slots" not in inputs:
            every = torch.full_like(inputs["labels"][:, 0], method.latent_budget)
            inputs = {**inputs, "slots": every}
        output = storm_rollout(core, inputs, method, progress, self._all_have_targets)
        answer = answer_loss(output.logits, inputs["labels"], tokens)
        longest = int(output.has_slot.any(0).sum())
        self._refuse_dead_latents(core, answer, output.fed[:longest])
        losses = {"loss": answer, "answer_loss": answer}
        if method.latent_budget:
            counted = (inputs["labels"] != IGNORE_INDEX).any(1)
            boundary = boundary_loss(core, output, rows, counted)
            losses["boundary_loss"] = boundary
            losses["loss"] = losses["loss"] + method.boundary_weight * boundary
        targets = inputs.get("targets")
        if method.latent_budget and targets is not None:
            mask, how = inputs["target_mask"][:, None], method.alignment_reduction
            has_target = mask & output.has_slot
            alignment = alignment_loss(output.states, targets, has_target, how, aligned)
            losses["loss"] = storm_loss(losses["loss"], alignment, method.alignment_weight)
            losses["alignment_loss"] = alignment
        if torch.is_grad_enabled():
            self._watch(output, losses, inputs)
        return losses

    def _watch(
        self, output: RolloutOutput, losses: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> None:
        """Keep what the curves show, and have the backward pass tell what reached the slots."""
        for name in set(losses) - {"loss"}:
            self._metrics[name].append(losses[name].detach() * self._parts)
        states = output.states.detach().float()
        has_slot = output.has_slot
        self._keep_by_slot("slot_norm", states.norm(dim=-1), has_slot)
        if "targets" in inputs:
            cosine = F.cosine_similarity(states, inputs["targets"].float(), dim=-1)
            self._keep_by_slot("slot_cosine", cosine, has_slot & inputs["target_mask"][:, None])
        for k, fed in enumerate(output.fed):
            fed.register_hook(functools.partial(self._credited, k))

    def _keep_by_slot(self, name: str, values: Tensor, mask: Tensor) -> None:
        """The mean of each slot's values (B, K) over the rows of the mask (B, K), where there is any."""
        for k in mask.any(0).nonzero().flatten().tolist():
            self._metrics[f"{name}/{k + 1}"].append(values[mask[:, k], k].mean())

    def _credited(self, k: int, gradient: Tensor) -> None:
        self._metrics[f"slot_gradient/{k + 1}"].append(gradient.detach().float().norm())

    def _refuse_dead_latents(self, core: Any, answer: Tensor, fed: Sequence[Tensor]) -> None:
        """Once, before a run on the model's own states: does the answer's gradient reach every slot?

        (Not where FSDP shards the model: it allows one backward pass for a forward.)

        Raises:
            RuntimeError: no; it would train on nothing, without any other sign.
        """
        if self._checked or not fed or isinstance(core, FSDPModule) or not answer.requires_grad:
            return
        self._checked = True
        gradients = torch.autograd.grad(answer, fed, retain_graph=True, allow_unused=True)
        dead = [k for k, g in enumerate(gradients, 1) if g is None or not bool(g.any())]
        if dead and self.method.slot_input == "rollout":
            raise RuntimeError(
                f"no gradient of the answer reaches latent slot {dead[0]}: the fed-back states are cut off from "
                "the loss. Is the model's cache, attention or checkpointing patched?"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        folder, limit = run / f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        self.args.save_total_limit = None  # older ones may go when this one is whole, not before
        self.check_weights()
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                unwrap(self.model).config.save_pretrained(folder)  # adapters know no latent tokens
            if self.teacher is not None and self.args.should_save:
                self.teacher.save(folder)
        except Exception as error:  # each writer has its own way to say that the disk is full
            shutil.rmtree(folder, ignore_errors=True)
            raise SaveError(folder, run, error) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers 5 saves a VLM's tensors under the hub's names, but on resuming looks for the module's own, and
        only warns when it finds none of them: training would go on from the initial weights."""
        model = self.model if model is None else model
        if self.is_fsdp_enabled or unwrap(model) is not model:  # sharded, or adapters: other files
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = StormForConditionalGeneration.from_pretrained(
                resume_from_checkpoint, dtype=model.dtype
            )
            model.load_state_dict(saved.state_dict())
        if self.teacher is not None:
            self.teacher.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {
            name: round(float(torch.stack(values).mean()), 5)
            for name, values in sorted(self._metrics.items())
        }
        self._metrics.clear()
        super().log({**logs, **means}, *args, **kwargs)


def batch_counts(batch: Mapping[str, Tensor]) -> Tensor:
    """(3,): answer tokens, rows with an answer, and rows with a target; the losses are means over these."""
    answers, mask = batch["labels"] != IGNORE_INDEX, batch.get("target_mask")
    aligned = answers.new_zeros((), dtype=torch.long) if mask is None else mask.sum()
    return torch.stack([answers.sum(), answers.any(1).sum(), aligned])


class LossBar(ProgressCallback):
    """The progress bar with the losses at its end, instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        losses = {name: value for name, value in (logs or {}).items() if name.endswith("_loss")}
        if self.training_bar is not None:
            self.training_bar.set_postfix(losses)


def target_share(progress: float) -> float:
    """Share of slots fed with targets under `scheduled`: all of them at first, then ever fewer, none at the end.

    `progress` is 0 … 1. Own states fed before a single step is right teach errors; fed when the learning rate has
    decayed, they teach nothing (`dev/LOG.md`).
    """
    return min(1.0, max(0.0, (0.85 - progress) / 0.3))


def bottleneck_share(progress: float) -> float:
    """Share of rows whose answers do not see the video under `scheduled`: none in the first fifth of a stage, then
    ever more, and all from three fifths on."""
    return min(1.0, max(0.0, (progress - 0.2) / 0.4))


def storm_rollout(
    model: Any,
    inputs: Mapping[str, Tensor],
    method: Method,
    progress: float = 0.0,
    all_have_targets: bool = True,
) -> RolloutOutput:
    """The rollout with slots fed as `method.slot_input` says.

    Args:
        progress: how far the stage is, 0 … 1.
        all_have_targets: no row of the whole data set lacks a target. Else the slots of rows without one are fed
            with own states, slot by slot in every batch, so that all batches take the same number of passes.
    """
    budget, targets = method.latent_budget, inputs.get("targets")
    slot_inputs = use_target = None
    if budget and method.slot_input == "pause":
        pad = torch.full_like(inputs["labels"][:, :1], latent_tokens(model.config).pad)
        slot_inputs = model.get_input_embeddings()(pad).expand(-1, budget, -1)
    elif budget and targets is not None and method.slot_input in ("target", "scheduled"):
        share = target_share(progress) if method.slot_input == "scheduled" else 1.0
        slot_inputs, mask = targets, inputs["target_mask"]
        if share < 1 or not all_have_targets:
            use_target = (torch.rand(targets.shape[:2], device=mask.device) < share) & mask[:, None]
    bottleneck = None
    if method.bottleneck != "none":  # the same passes on every process, whatever rows it is
        share = bottleneck_share(progress) if method.bottleneck == "scheduled" else 1.0
        bottleneck = torch.rand(len(inputs["labels"]), device=inputs["labels"].device) < share
    return rollout(
        model,
        inputs,
        budget,
        slot_inputs,
        use_target,
        detach_feedback=method.detach_feedback,
        bottleneck=bottleneck,
    )


def boundary_loss(
    model: Any, output: RolloutOutput, count: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the segment's visible choices: open it, go on after each slot but the last, close it.

    The answer-only loss of the paper would never teach the model to open a segment, which its inference
    ("once <|latent_start|> is generated") relies on; and with a loss on the end alone the model closes the
    segment after a slot or two, because nothing tells it not to. "Go on" is any token but the end.

    Args:
        count: what the sum over rows is divided by, if not their number in this batch.
        mask: (B,) bool, the rows that count; None: all.
    """
    tokens = latent_tokens(model.config)
    assert output.start_logits is not None and output.end_logits is not None  # there are slots
    logits = torch.stack([output.start_logits, output.end_logits], 1).float()  # (B, 2, V)
    wanted = torch.tensor([tokens.start, tokens.end], device=logits.device).expand(len(logits), -1)
    each = F.cross_entropy(logits.mT, wanted, reduction="none").mean(1)  # (B,)
    if output.states.shape[1] > 1:  # the state after slot k is the one fed into slot k + 1
        between = head(unwrap(model), output.states[:, 1:]).float()  # (B, K - 1, V)
        others = between.index_fill(-1, wanted[0, 1:], float("-inf"))
        goes_on = output.has_slot[:, 1:]  # (B, K - 1)
        missed = (between.logsumexp(-1) - others.logsumexp(-1)).masked_fill(~goes_on, 0)
        each = each + missed.sum(1) / goes_on.sum(1).clamp_min(1)
    if mask is not None:
        each = each.masked_fill(~mask, 0)
    return each.sum() / (len(each) if count is None else count.clamp_min(1))
