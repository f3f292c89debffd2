"""What a model holds for each row, computed once: latent, text and visual states (paper, sec. 4.4 and appendix A).

They are computed batch by batch, each of which is kept as it comes: a killed run goes on, and the processes of a run
share the work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load, save_file
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.analysis import AnalysisError
from storm_vlm.data.collator import Question
from storm_vlm.data.identity import checkpoint_identity
from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.backbones import backbone, input_device
from storm_vlm.model.interventions import latent_states, recorded_layers
from storm_vlm.model.latent import pool_targets, target_whitening, whiten_targets
from storm_vlm.training.config import FRAMES_PER_SLOT
from storm_vlm.training.targets import excerpts

PROBED = 8  # decoder layers at most


@dataclass(frozen=True)
class States:
    """States of N rows on the CPU, float32. Rows differ in frames and keyframes, so those come in lists."""

    latents: Tensor  #: (N, K, D): what the model feeds into its K slots
    layers: Tensor  #: (N, L, K + 2, D): at each slot, the question (its mean) and the token before the segment, ...
    probed_layers: tuple[int, ...]  #: ... what these L layers of the decoder return
    further: Tensor  #: (N, K, D): and would feed into K more, beyond its budget
    text: Tensor  #: (N, D): mean over the question's tokens of the decoder's last layer, video in sight
    frames: list[
        Tensor
    ]  #: N times (grids, D): the vision tower's tokens, mean over each temporal grid
    keyframes: list[Tensor]  #: N times (keyframes, D), of no keyframes where the row names none
    targets: Tensor  #: (N, K, D): pooled thought video, its last one held to the end; zero where there is none
    target_counts: Tensor  #: (N,): how many that are, K or the row's `slots`; 0 where there is none

    @property
    def has_target(self) -> Tensor:
        """(N,) bool."""
        return self.target_counts > 0

    @cached_property
    def whitening(self) -> tuple[Tensor, Tensor]:
        """Mean and matrix that whiten visual states, from these rows' targets, else from their frames."""
        pooled = torch.arange(self.targets.shape[1]) < self.target_counts[:, None]
        enough = int(self.has_target.sum()) > 1
        return target_whitening(self.targets[pooled] if enough else torch.cat(self.frames))

    @cached_property
    def whitened_space(self) -> bool:
        """Whether latents resemble their targets more if those are whitened: how the model was trained.

        False without a thought video: as in the paper.
        """
        if not bool(self.has_target.any()):
            return False
        latents, targets = self.latents[self.has_target], self.targets[self.has_target]
        alike = torch.nn.functional.cosine_similarity
        white = whiten_targets(targets, *self.whitening)
        return bool(alike(latents, white, dim=-1).mean() > alike(latents, targets, dim=-1).mean())

    def visual(self, states: Tensor) -> Tensor:
        """Visual states (..., D) in the space that the latents live in."""
        return whiten_targets(states, *self.whitening) if self.whitened_space else states


@dataclass(frozen=True)
class Batches:
    """Computes tensors of rows, batch by batch; with a store, each batch is kept, and shared between processes."""

    size: int
    store: Store | None = None
    made_from: dict[str, Any] = field(
        default_factory=dict
    )  #: what decides the tensors, beside the rows

    def __call__(
        self,
        kind: str,
        rows: Sequence[Row | Question],
        compute: Callable[[Sequence[Row | Question]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What `compute` makes of all rows, joined along the first dimension."""
        batches = [rows[first : first + self.size] for first in range(0, len(rows), self.size)]
        if self.store is None:
            return _joined([compute(batch) for batch in tqdm(batches, kind, leave=False)])
        here, parts = PartialState(not torch.cuda.is_available()), []
        for number, batch in enumerate(tqdm(batches, kind, leave=False)):
            if number % here.num_processes == here.process_index:
                self._kept(kind, batch, compute)
        here.wait_for_everyone()
        parts = [self._kept(kind, batch, compute) for batch in batches]
        return _joined(parts)

    def _kept(self, kind: str, batch: Any, compute: Any) -> dict[str, Tensor]:
        assert self.store
        key = key_of(
            kind=kind, **self.made_from, rows=[_identity(row, self.store) for row in batch]
        )
        kept = self.store.read("states", key, lambda file: load(file.read_bytes()), ".safetensors")
        if kept is None:
            kept = compute(batch)
            with self.store.place("states", key, ".safetensors") as unfinished:
                save_file({name: t.contiguous() for name, t in kept.items()}, unfinished)
        return kept


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _identity(row: Row | Question, store: Store) -> Any:
    """A row by what it says, its clips by content."""
    said = row.model_dump(mode="json") if isinstance(row, Row) else asdict(row)
    thought = row.thought_video if isinstance(row, Row) else None
    clips = [str(row.video), *([thought.path] if thought else [])]
    # a missing clip is reported when it is read
    return [said, [store.content(clip) for clip in clips if Path(clip).exists()]]


def kept_batches(pipeline: StormPipeline, folder: Path, source: str, size: int) -> Batches:
    """Batches that are kept in `folder`; `source` names the checkpoint."""
    store = Store(folder)
    made_from = {
        "checkpoint": source,
        "weights": checkpoint_identity(source, store),
        "latent_budget": pipeline.collator.latent_budget,
        "num_frames": pipeline.collator.videos.num_frames,
        "pixels": json.loads(pipeline.processor.video_processor.to_json_string()),
        "dtype": str(pipeline.model.dtype),
    }
    return Batches(size, store, made_from)


def extract(pipeline: StormPipeline, rows: Sequence[Row], batches: Batches) -> States:
    """States of all rows.

    Raises:
        AnalysisError: the checkpoint has no latent slots, or there are no rows.
        VideoError: a clip cannot be read.
    """
    if pipeline.latent_mode == "off" or not rows:
        raise AnalysisError("this needs rows, and a checkpoint with latent slots (storm train)")
    tensors = batches("states and targets", rows, lambda batch: _batch_states(pipeline, batch))
    frames = tensors.pop("frames").split(tensors.pop("frame_counts").tolist())
    keyframes = tensors.pop("keyframes").split(tensors.pop("keyframe_counts").tolist())
    places = tuple(probed_layers(pipeline))
    return States(frames=list(frames), keyframes=list(keyframes), probed_layers=places, **tensors)


def probed_layers(pipeline: StormPipeline) -> list[int]:
    """At most `PROBED` decoder layers, evenly spread, the last among them; from 0."""
    count = len(backbone(pipeline.model).decoder.layers)
    return sorted({round((i + 1) * count / PROBED) - 1 for i in range(PROBED)} - {-1})


def _batch_states(pipeline: StormPipeline, rows: Sequence[Any]) -> dict[str, Tensor]:
    model, collator = pipeline.model, pipeline.collator
    budget = collator.latent_budget
    inputs = collator.collate_prompts(rows, "force")
    device = input_device(model)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    length = inputs["input_ids"].shape[1]

    def read(hidden: Tensor) -> Tensor:
        if hidden.shape[1] < length:  # slots
            return hidden
        return torch.stack(
            [_question_mean(pipeline, inputs["input_ids"], hidden), hidden[:, -2]], 1
        )

    with recorded_layers(model, probed_layers(pipeline), read) as layers:
        states, hidden = latent_states(model, inputs, 2 * budget)
    by_layer = [torch.cat(passes, 1) for passes in layers]  # text, then slots
    frames = visual_tokens(pipeline, [collator.videos.get(r.video, r.start, r.end) for r in rows])
    keyframes = _tokens_of(pipeline, excerpts(rows, "keyframes"))
    thoughts = _tokens_of(pipeline, excerpts(rows, "thought_video"))
    none = states.new_zeros(0, states.shape[-1])
    pooled = [t.mean((1, 2)) for t in frames]
    shown = [none if t is None else t.mean((1, 2)) for t in keyframes]
    counts = [0 if e is None else e.slots or budget for e in excerpts(rows, "thought_video")]
    targets = [
        states.new_zeros(budget, states.shape[-1])
        if t is None
        else _held(pool_targets(t.flatten(0, 2), count), budget)
        for t, count in zip(thoughts, counts, strict=True)
    ]
    tensors = {
        "latents": states[:, :budget],
        "further": states[:, budget:],
        "layers": torch.stack([t[:, : 2 + budget].roll(-2, 1) for t in by_layer], 1),
        "text": _question_mean(pipeline, inputs["input_ids"], hidden),
        "frames": torch.cat(pooled),
        "frame_counts": torch.tensor([len(t) for t in pooled]),
        "keyframes": torch.cat(shown),
        "keyframe_counts": torch.tensor([len(t) for t in shown]),
        "targets": torch.stack(targets),
        "target_counts": torch.tensor(counts),
    }
    return {
        name: (t.float() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in tensors.items()
    }


def _held(targets: Tensor, budget: int) -> Tensor:
    """Targets (k, D) with the last one held, (K, D)."""
    return torch.cat([targets, targets[-1:].expand(budget - len(targets), -1)])


def _question_mean(pipeline: StormPipeline, ids: Tensor, hidden: Tensor) -> Tensor:
    """Mean state (B, D) of the tokens between the video and the end of the user's turn."""
    means = []
    for row, states in zip(ids, hidden, strict=True):
        video = (row == backbone(pipeline.model).video_token_id).nonzero()
        first = int(video[-1]) + 2 if len(video) else 0  # behind <|vision_end|>
        ends = (row[first:] == pipeline.processor.tokenizer.eos_token_id).nonzero()
        means.append(states[first : first + int(ends[0]) if len(ends) else len(row)].mean(0))
    return torch.stack(means)


def _tokens_of(pipeline: StormPipeline, sources: Iterable[Any]) -> list[Tensor | None]:
    budget = pipeline.collator.latent_budget
    clips = [s and s.read(FRAMES_PER_SLOT * (s.slots or budget)) for s in sources]
    processed = [pipeline.collator.videos.process(clip) for clip in clips if clip is not None]
    tokens = iter(visual_tokens(pipeline, processed))
    return [None if clip is None else next(tokens) for clip in clips]


@torch.no_grad()
def visual_tokens(pipeline: StormPipeline, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The vision tower's tokens of each processed clip: (grids, height, width, D)."""
    base, device = backbone(pipeline.model), input_device(pipeline.model)
    clips = ({name: tensor.to(device) for name, tensor in clip.items()} for clip in inputs)
    return [base.visual_tokens(base.video_features(clip), clip) for clip in clips]
