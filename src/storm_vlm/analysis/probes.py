"""Can the answer be read from the latents? A linear probe at every slot and layer (PRISM, arXiv 2606.05753).

A latent can lie near its target and say nothing of the answer, and the other way round. So beside the probes stand
how both go together with right answers, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from storm_vlm.analysis.states import States
from storm_vlm.data.prompt import answer_text
from storm_vlm.data.row import Row
from storm_vlm.evaluation.records import Probes
from storm_vlm.evaluation.statistics import Estimate, bootstrap, estimate

FOLDS = 5
RIDGE = 0.1  # of a kernel's mean diagonal
FEWEST = 20  # rows


def probe(states: States, rows: Sequence[Row], right: Sequence[bool]) -> Probes | None:
    """Probes of `states.layers` (N, L, K + 2, D); `right`: what the model answers rightly with its own latents.

    None: there are fewer than `FEWEST` rows or `FOLDS` videos, or one answer only.
    """
    answers, videos = [answer_text(row) for row in rows], [row.video for row in rows]
    classes = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
    if len(rows) < FEWEST or len(set(videos)) < FOLDS or len(classes) < 2:
        return None
    wanted = torch.tensor([classes[answer] for answer in answers])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    slots = states.latents.shape[1]
    places = {f"slot {k + 1}": [k] for k in range(slots)}
    places |= {"all slots": [*range(slots)], "question": [slots], "last token": [slots + 1]}
    places["all text"] = [slots, slots + 1]
    hits = {
        name: _hits(states.layers[:, :, at], torch.stack([wanted, wanted[order]]), _folds(videos))
        for name, at in places.items()
    }
    of_slots, by_chance = hits["all slots"].double().mean(-1)  # (N,) over layers
    of_text = hits["all text"][0].double().mean(-1)
    cosine = F.cosine_similarity(states.latents, states.visual(states.targets), dim=-1).mean(1)
    return Probes(
        layers=tuple(states.probed_layers),
        accuracy={name: found[0].double().mean(0).tolist() for name, found in hits.items()},
        slots=estimate(of_slots, videos),
        text=estimate(of_text, videos),
        shuffled=estimate(by_chance, videos),
        over_text=estimate(of_slots - of_text, videos),
        over_shuffled=estimate(of_slots - by_chance, videos),
        decodability=correlation(of_slots.numpy(), right, videos),
        cosine=correlation(cosine.numpy(), right, videos)
        if bool(states.has_target.all())
        else None,
    )


def correlation(
    values: np.ndarray, right: Sequence[bool], videos: Sequence[str]
) -> Estimate | None:
    """Pearson's r of values and right answers, with an interval over videos; None: one of them does not vary."""
    pairs = np.stack([values, np.asarray(right, float)], 1)
    if not np.ptp(pairs, axis=0).all():
        return None
    x, y = pairs.T
    moments = np.stack([x, y, x * x, y * y, x * y], 1)

    def pearson(means: np.ndarray) -> np.ndarray:
        a, b, aa, bb, ab = means.T
        return (ab - a * b) / np.sqrt(np.maximum((aa - a * a) * (bb - b * b), 1e-18))

    return bootstrap(moments, pearson, videos)


def _folds(videos: Sequence[str]) -> Tensor:
    """The fold (N,) of each row; no video is in two."""
    number = {video: i for i, video in enumerate(dict.fromkeys(videos))}
    return torch.tensor([number[video] % FOLDS for video in videos])


def _hits(features: Tensor, labels: Tensor, folds: Tensor) -> Tensor:
    """Whether ridge regression on one-hot answers, fitted to the other folds, names the label: (M, N, L) bool.

    `features` (N, L, P, D), side by side; `labels` (M, N): M ways to label the rows.
    """
    hits = torch.zeros(*labels.shape, features.shape[1], dtype=torch.bool)
    one_hot = F.one_hot(labels).double()  # (M, N, C)
    for layer in range(features.shape[1]):
        x = features[:, layer].flatten(1).double()
        for fold in range(FOLDS):
            held = folds == fold
            z = (x - x[~held].mean(0)) / x[~held].std(0).clamp_min(1e-6)
            kernel, asked = z[~held] @ z[~held].T, z[held] @ z[~held].T
            kernel.diagonal().add_(RIDGE * kernel.diagonal().mean() + 1e-6)
            base = one_hot[:, ~held].mean(1, keepdim=True)
            wanted = (one_hot[:, ~held] - base).transpose(0, 1).flatten(1)
            found = (asked @ torch.linalg.solve(kernel, wanted)).unflatten(1, (len(labels), -1))
            hits[:, held, layer] = (found.transpose(0, 1) + base).argmax(-1) == labels[:, held]
    return hits
