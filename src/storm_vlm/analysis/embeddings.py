"""Where latents lie among the frames and keyframes of clips: PCA, t-SNE and a distance (paper, Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from storm_vlm.analysis.extract import States
from storm_vlm.data.row import Row
from storm_vlm.evaluation.statistics import estimate

try:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
except ModuleNotFoundError as error:  # before an analysis, or hours of training, begin
    raise ValueError("needs scikit-learn: pip install 'storm-vlm[analysis]'") from error

SHOWN = 20  # rows in the figure, as in the paper


def project(states: States, rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Two-dimensional `pca` and `tsne` coordinates of the first `SHOWN` clips' frames, keyframes and latents.

    Visual states are in the latents' space (`States.visual`). `points` says what each coordinate is: its
    kind, its row, and for latents the slot.
    """
    places = list({row.video: i for i, row in reversed(list(enumerate(rows)))}.values())
    points: list[dict[str, Any]] = []
    vectors: list[Tensor] = []
    for i in sorted(places)[:SHOWN]:
        kinds = {
            "frame": states.visual(states.frames[i]),
            "keyframe": states.visual(states.keyframes[i]),
            "latent": states.latents[i],
        }
        for kind, found in kinds.items():
            points += [{"kind": kind, "row": rows[i].id, "at": at} for at in range(len(found))]
            vectors.append(found)
    data = torch.cat(vectors).numpy()
    perplexity = min(30, max(2, len(data) // 4))
    fitted = PCA(2, random_state=seed).fit(data)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(data)
    return {
        "points": points,
        "pca": np.round(fitted.transform(data), 4).tolist(),
        "pca_explained": fitted.explained_variance_ratio_.tolist(),
        "tsne": np.round(tsne, 4).tolist(),
        "perplexity": perplexity,
        "space": "whitened" if states.whitened_space else "raw",
    }


def nearness(states: States, rows: Sequence[Row]) -> dict[str, Any]:
    """Cosine distance of latents to their own clip's keyframes, and to other clips': the number behind Figure 5.

    Also to their own and others' thought videos, slot by slot, where rows have one. `nearer` is how often the
    own ones are nearer than another clip's drawn at random (a half: no relation). None where rows have
    neither. Intervals over videos.
    """
    with_keyframes = [i for i, keyframes in enumerate(states.keyframes) if len(keyframes)]
    keyed = [states.visual(states.keyframes[i]).mean(0) for i in with_keyframes]
    thought = states.has_target.nonzero()[:, 0].tolist()
    flat = states.latents.flatten(1)
    return {
        "keyframes": _compared(states.latents.mean(1), keyed, with_keyframes, rows),
        "thought_video": _compared(
            flat, list(states.visual(states.targets[thought]).flatten(1)), thought, rows
        ),
    }


def _compared(
    queries: Tensor, keys: list[Tensor], places: list[int], rows: Sequence[Row]
) -> dict[str, Any] | None:
    if len({rows[i].video for i in places}) < 2:
        return None
    found = F.normalize(torch.stack(keys), dim=-1)
    distance = 1 - F.normalize(queries[places], dim=-1) @ found.T  # (n, n)
    videos = [rows[i].video for i in places]
    other = torch.tensor([[a != b for b in videos] for a in videos])
    own = distance.diagonal()
    others = (distance * other).sum(1) / other.sum(1)
    nearer = ((own[:, None] < distance) * other).sum(1) / other.sum(1)
    measured = {"own": own, "others": others, "nearer": nearer}
    return {name: estimate(values.numpy(), videos) for name, values in measured.items()}
