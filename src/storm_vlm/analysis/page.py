"""What the validity suite measures, and its page: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from storm_vlm.analysis import figures
from storm_vlm.analysis.embeddings import Embeddings
from storm_vlm.analysis.readouts import (
    Decoder,
    Readouts,
    logit_lens,
    similarity_maps,
    thought_frames,
)
from storm_vlm.analysis.reliance import SlotAccuracy
from storm_vlm.analysis.retrieval import Retrieval
from storm_vlm.analysis.states import States
from storm_vlm.data.answer import is_correct
from storm_vlm.data.atomic_write import write_text
from storm_vlm.data.row import Row
from storm_vlm.data.video import read_video
from storm_vlm.evaluation.records import Probes, Reliance
from storm_vlm.evaluation.verdict import Verdict
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.pages import render

PICTURE = 80  # pixels of a picture's side in a strip
GAP = 4
Card = dict[str, Any]


@dataclass(frozen=True)
class Analysis:
    """All that is measured, by part; None where these rows do not allow it."""

    verdict: Verdict
    reliance: Reliance
    probes: Probes | None
    slots: SlotAccuracy
    embeddings: Embeddings
    retrieval: Retrieval | None
    watch: Readouts


def write_page(
    path: Path, about: dict[str, Any], analysis: Analysis, cards: Sequence[Card]
) -> None:
    """Write the page of a validation."""
    write_text(path, render("validity.html", about=about, **template_values(analysis, cards)))


def template_values(analysis: Analysis, cards: Sequence[Card]) -> dict[str, Any]:
    """What `_validity.html` needs, on whichever page it is."""
    measured = {
        name: part for name, part in vars(analysis).items() if name not in ("verdict", "watch")
    }
    drawn = figures.draw(**measured)
    return {**vars(analysis), "figures": drawn, "examples": cards}


def card(
    pipeline: StormPipeline,
    row: Row,
    answer: str,
    states: States,
    place: int,
    decoder: Decoder | None,
) -> Card:
    """A row with what the model thought, as the page shows it: with pictures, so that it can be kept as JSON."""
    latents = states.latents[place]
    clip = read_video(row.video, pipeline.collator.videos.num_frames, row.start, row.end)
    strips = [("what the model sees", _strip(_pictures(_pixels(clip.frames))))]
    if row.thought_video:
        coming = _pictures(thought_frames([row], len(latents))[0])
        strips.append(("what comes (thought video)", _strip(coming)))
    if decoder:
        strips.append(("what the latents say, drawn", _strip(_pictures(decoder(latents)))))
    maps, frames = _maps(similarity_maps(pipeline, row, latents, states), clip.frames)
    where = f"where in the clip each slot points (frames {', '.join(map(str, frames))})"
    return {
        "question": row.question,
        "wanted": row.answer,
        "answer": answer,
        "correct": bool(is_correct(answer, row)),
        "strips": [*strips, (where, _strip(maps))],
        "lens": logit_lens(pipeline, latents),
    }


def _pixels(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2) / 255


def _pictures(frames: Tensor) -> Tensor:
    return F.interpolate(frames.float(), (PICTURE, PICTURE), mode="nearest")


def _maps(maps: Tensor, frames: np.ndarray) -> tuple[Tensor, list[int]]:
    """For each slot, the frame with the token that points its way most, in grey, with its map in orange."""
    grids = maps.flatten(2).amax(2).argmax(1).tolist()
    per_grid = max(1, len(frames) // maps.shape[1])
    places = [min(len(frames) - 1, grid * per_grid + per_grid - 1) for grid in grids]
    grey = _pictures(_pixels(frames[places])).mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0.7
    heat = torch.stack([maps[slot, grid] for slot, grid in enumerate(grids)])[:, None]
    low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
    heat = F.interpolate((heat - low) / (high - low).clamp_min(1e-6), (PICTURE, PICTURE))
    orange = torch.tensor([1.0, 0.45, 0.05])[:, None, None]
    opacity = 0.85 * heat.square()
    return grey * (1 - opacity) + orange * opacity, [index + 1 for index in places]


def _strip(pictures: Tensor) -> str:
    """Pictures (n, 3, H, W) side by side as a PNG data URI, with see-through gaps."""
    alpha = torch.ones_like(pictures[:, :1])
    padded = F.pad(torch.cat([pictures, alpha], 1), (0, GAP))
    row = torch.cat(list(padded), -1)[..., :-GAP].permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray((row.clamp(0, 1) * 255).round().byte().numpy(), "RGBA").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
