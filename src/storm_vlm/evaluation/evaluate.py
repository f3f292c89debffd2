"""Whether answers depend on the latents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from storm_vlm.data.schema import Row
from storm_vlm.interventions import Intervention, latent_interventions
from storm_vlm.pipeline import StormPipeline

SWAPS: tuple[Intervention, ...] = ("none", "swap_inputs", "swap_keys_values", "drop")


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
