"""Ask a model every row, score with the one scorer, and say how sure the figure is."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import is_correct
from storm_vlm.data.schema import Row
from storm_vlm.data.video import Clip, read_video
from storm_vlm.evaluation.statistics import confidence_interval
from storm_vlm.interventions import Intervention, latent_interventions
from storm_vlm.pipeline import StormPipeline

Control = Literal["text_only", "one_frame", "shuffled_frames"]
CONTROLS: tuple[Control, ...] = ("text_only", "one_frame", "shuffled_frames")
SWAPS: tuple[Intervention, ...] = ("none", "swap_inputs", "swap_keys_values", "drop")


@dataclass(frozen=True)
class Result:
    """One row's outcome; `correct` is None where the answer could not be parsed (it counts as wrong)."""

    id: str
    family: str
    prediction: str
    answer: str
    correct: bool | None
    slots_used: int
    forced_end: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    batch_size: int = 32,
    control: Control | None = None,
    **generate_kwargs: Any,
) -> list[Result]:
    """Answer each row; `control` takes away what a model that watches the video would need.

    Raises VideoError for a clip that cannot be read.
    """
    results: list[Result] = []
    for first in tqdm(range(0, len(rows), batch_size), f"evaluate {control or ''}", leave=False):
        batch = rows[first : first + batch_size]
        asked = [_controlled(row, control, pipeline.collator.videos.num_frames) for row in batch]
        answers = pipeline.answer_batch(asked, **generate_kwargs)
        for row, answer in zip(batch, answers, strict=True):
            results.append(
                Result(
                    row.id,
                    str(row.meta.get("family", "all")),
                    answer.text,
                    row.answer,
                    is_correct(answer.text, row),
                    answer.slots_used,
                    answer.forced_end,
                )
            )
    return results


def _controlled(row: Row, control: Control | None, num_frames: int) -> Row | Question:
    if control is None:
        return row
    if control == "text_only":
        return Question(None, row.question, row.options)
    clip = read_video(row.video, num_frames, row.start, row.end)
    if control == "one_frame":
        order = np.full(len(clip.frames), len(clip.frames) - 1)
    else:
        order = np.array(random.Random(row.id).sample(range(len(clip.frames)), len(clip.frames)))
    return Question(Clip(clip.frames[order], clip.timestamps, clip.path), row.question, row.options)


@torch.no_grad()
def evaluate_interventions(
    pipeline: StormPipeline, rows: Sequence[Row], batch_size: int = 32
) -> dict[Intervention, list[bool]]:
    """Whether each row is answered right when its latent segment is tampered with.

    Answers are teacher-forced (right means: every answer token is the most likely one, which is what greedy
    decoding would write). Rows trade latents with another clip that was asked a question of the same
    family and has another answer, as far as a batch allows.
    """
    right: dict[Intervention, list[bool]] = {kind: [] for kind in SWAPS}
    budget = pipeline.collator.latent_budget
    for family in _groups_with_donors(rows):
        # Sorted by answer and shifted by half a batch: donors mostly have another answer.
        ordered = sorted(family, key=lambda row: (row.id[-1], row.answer))
        for part in np.array_split(np.arange(len(ordered)), max(1, len(ordered) // batch_size)):
            batch = [ordered[i] for i in part]
            inputs = {k: v.to(pipeline.model.device) for k, v in pipeline.collator(batch).items()}
            donors = torch.arange(len(batch), device=pipeline.model.device).roll(len(batch) // 2)
            labels = inputs["labels"]
            for kind, logits in latent_interventions(
                pipeline.model, inputs, budget, donors, SWAPS
            ).items():
                hit = (logits.argmax(-1) == labels) | (labels == -100)
                right[kind] += hit.all(1).tolist()
    return right


def _groups_with_donors(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by family; those alone in theirs go together, so that each has another to trade with."""
    families: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[str(row.meta.get("family", "all"))].append(row)
    groups = [family for family in families.values() if len(family) > 1]
    alone = [family[0] for family in families.values() if len(family) == 1]
    if len(alone) == 1 and groups:
        groups[0] = groups[0] + alone
    elif len(alone) > 1:
        groups.append(alone)
    elif alone:
        raise ValueError("interventions trade latents between rows: give at least two rows")
    return groups


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Accuracy with its interval, by family too; unparsed, slots used, forced ends."""
    families = sorted({result.family for result in results})
    return {
        "n": len(results),
        "accuracy": accuracy([result.correct for result in results]),
        "interval": confidence_interval([bool(result.correct) for result in results]),
        "unparsed": sum(result.correct is None for result in results),
        "slots_used": sum(result.slots_used for result in results) / len(results),
        "forced_end": accuracy([result.forced_end for result in results]),
        "families": {
            family: accuracy([r.correct for r in results if r.family == family])
            for family in families
        },
    }


def accuracy(outcomes: Sequence[bool | None]) -> float:
    """Share of right answers; unparsed ones stay in the denominator."""
    return sum(bool(outcome) for outcome in outcomes) / len(outcomes) if outcomes else float("nan")
