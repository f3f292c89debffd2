"""What a model holds for each row, computed once: latent, text and visual states (paper, sec. 4.4 and appendix A)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.analysis import AnalysisError
from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.identity import checkpoint_identity
from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.backbones import input_device
from storm_vlm.model.interventions import latent_states
from storm_vlm.model.latent import pool_targets, target_whitening, whiten_targets
from storm_vlm.training.config import FRAMES_PER_SLOT
from storm_vlm.training.targets import excerpts
from storm_vlm.versions import commit, versions


@dataclass(frozen=True)
class States:
    """States of N rows on the CPU, float32. Rows differ in frames and keyframes, so those come in lists."""

    latents: Tensor  #: (N, K, D): what the model feeds into its K slots
    further: Tensor  #: (N, K, D): and would feed into K more, beyond its budget
    text: Tensor  #: (N, D): mean over the question's tokens of the decoder's last layer, video in sight
    frames: list[
        Tensor
    ]  #: N times (grids, D): the vision tower's tokens, mean over each temporal grid
    keyframes: list[Tensor]  #: N times (keyframes, D), of no keyframes where the row names none
    targets: Tensor  #: (N, K, D): pooled thought video, zero where there is none
    has_target: Tensor  #: (N,) bool

    @cached_property
    def whitening(self) -> tuple[Tensor, Tensor]:
        """Mean and matrix that whiten visual states, from these rows' targets, else from their frames."""
        with_target = self.targets[self.has_target]
        return target_whitening(with_target if len(with_target) > 1 else torch.cat(self.frames))

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


def extract(
    pipeline: StormPipeline, rows: Sequence[Row], folder: Path, source: str, batch_size: int = 16
) -> States:
    """States of all rows, from `folder` if they are there and were made from the same files, else computed.

    Writes `states.json`, what they were made from, beside them. `source` names the checkpoint.

    Raises:
        AnalysisError: the checkpoint has no latent slots, or there are no rows.
        VideoError: a clip cannot be read.
    """
    if pipeline.latent_mode == "off" or not rows:
        raise AnalysisError(
            "an analysis needs rows, and a checkpoint with latent slots (storm train)"
        )
    store = Store(folder)
    made_from = _made_from(pipeline, rows, source, store)
    key = key_of(**made_from)
    kept = store.read("states", key, lambda path: load(path.read_bytes()), ".safetensors")
    if kept is not None:
        return _unpacked(kept)
    parts = [
        _batch_states(pipeline, rows[first : first + batch_size])
        for first in tqdm(range(0, len(rows), batch_size), "states", leave=False)
    ]
    joined: dict[str, Any] = {name: [p[name] for p in parts] for name in parts[0]}
    tensors = {name: torch.cat(parts) for name, parts in joined.items()}
    with store.place("states", key, ".safetensors") as unfinished:
        save_file(tensors, unfinished)
    about = {"key": key, **made_from, "versions": versions(), "commit": commit()}
    about["shapes"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_json(folder / "states.json", about)
    return _unpacked(tensors)


def _batch_states(pipeline: StormPipeline, rows: Sequence[Row]) -> dict[str, Tensor]:
    model, collator = pipeline.model, pipeline.collator
    budget = collator.latent_budget
    inputs = collator.collate_prompts(rows, "force")
    device = input_device(model)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    states, hidden = latent_states(model, inputs, 2 * budget)
    frames = visual_tokens(pipeline, [collator.videos.get(r.video, r.start, r.end) for r in rows])
    keyframes = _tokens_of(pipeline, excerpts(rows, "keyframes"))
    thoughts = _tokens_of(pipeline, excerpts(rows, "thought_video"))
    none = states.new_zeros(0, states.shape[-1])
    pooled = [t.mean(1) for t in frames]
    shown = [none if t is None else t.mean(1) for t in keyframes]
    targets = [
        states.new_zeros(budget, states.shape[-1])
        if t is None
        else pool_targets(t.flatten(0, 1), budget)
        for t in thoughts
    ]
    tensors = {
        "latents": states[:, :budget],
        "further": states[:, budget:],
        "text": torch.stack(
            [
                _question_mean(pipeline, *row)
                for row in zip(inputs["input_ids"], hidden, strict=True)
            ]
        ),
        "frames": torch.cat(pooled),
        "frame_counts": torch.tensor([len(t) for t in pooled]),
        "keyframes": torch.cat(shown),
        "keyframe_counts": torch.tensor([len(t) for t in shown]),
        "targets": torch.stack(targets),
        "has_target": torch.tensor([t is not None for t in thoughts]),
    }
    return {
        name: (t.float() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in tensors.items()
    }


def _question_mean(pipeline: StormPipeline, ids: Tensor, hidden: Tensor) -> Tensor:
    """Mean state (D,) of the tokens between the video and the end of the user's turn."""
    video = (ids == pipeline.processor.video_token_id).nonzero()
    first = int(video[-1]) + 2 if len(video) else 0  # behind <|vision_end|>
    ends = (ids[first:] == pipeline.processor.tokenizer.eos_token_id).nonzero()
    return hidden[first : first + int(ends[0]) if len(ends) else len(ids)].mean(0)


def _tokens_of(pipeline: StormPipeline, sources: Iterable[Any]) -> list[Tensor | None]:
    num_frames = FRAMES_PER_SLOT * pipeline.collator.latent_budget
    clips = [None if source is None else source.read(num_frames) for source in sources]
    processed = [pipeline.collator.videos.process(clip) for clip in clips if clip is not None]
    tokens = iter(visual_tokens(pipeline, processed))
    return [None if clip is None else next(tokens) for clip in clips]


@torch.no_grad()
def visual_tokens(pipeline: StormPipeline, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The vision tower's tokens of each processed clip: (grids, h * w, D)."""
    if not inputs:
        return []
    device = input_device(pipeline.model)
    pixels = torch.cat([item["pixel_values_videos"] for item in inputs]).to(device)
    grids = torch.cat([item["video_grid_thw"] for item in inputs]).to(device)
    features = pipeline.model.model.get_video_features(pixels, grids).pooler_output
    return [t.unflatten(0, (int(grid[0]), -1)) for t, grid in zip(features, grids, strict=True)]


def _made_from(
    pipeline: StormPipeline, rows: Sequence[Row], source: str, store: Store
) -> dict[str, Any]:
    """What decides the states: rows by what they say, clips and a checkpoint's files by content."""
    clips = {row.video for row in rows} | {r.thought_video.path for r in rows if r.thought_video}
    return {
        "checkpoint": source,
        "weights": checkpoint_identity(source, store),
        "rows": len(rows),
        "rows_digest": key_of(rows=[row.model_dump(mode="json") for row in rows]),
        # a missing clip is reported when it is read
        "clips_digest": key_of(clips=[store.content(c) for c in sorted(clips) if Path(c).exists()]),
        "latent_budget": pipeline.collator.latent_budget,
        "num_frames": pipeline.collator.videos.num_frames,
        "pixels": json.loads(pipeline.processor.video_processor.to_json_string()),
        "dtype": str(pipeline.model.dtype),
    }


def _unpacked(tensors: dict[str, Tensor]) -> States:
    frames = tensors["frames"].split(tensors["frame_counts"].tolist())
    keyframes = tensors["keyframes"].split(tensors["keyframe_counts"].tolist())
    plain = {n: tensors[n] for n in ("latents", "further", "text", "targets", "has_target")}
    return States(frames=list(frames), keyframes=list(keyframes), **plain)
