"""Where latents lie among the frames and keyframes of clips: PCA, t-SNE and a distance (paper, Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from storm_vlm.analysis import AnalysisError
from storm_vlm.analysis.states import States
from storm_vlm.data.row import Row
from storm_vlm.evaluation.statistics import Estimate, estimate

try:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
except ModuleNotFoundError as error:  # before an analysis, or hours of training, begin
    raise AnalysisError(
        "an analysis needs scikit-learn: pip install 'storm-vlm[analysis]'"
    ) from error

SHOWN = 20  # rows in the figure, as in the paper


@dataclass(frozen=True)
class Point:
    """A state in the figure: a frame, keyframe or latent, the how manieth of its row."""

    kind: str
    row: str
    at: int


@dataclass(frozen=True)
class Projection:
    """Two-dimensional coordinates of each point."""

    points: list[Point]
    pca: list[list[float]]
    pca_explained: list[float]  #: share of the variance, by component
    tsne: list[list[float]]
    perplexity: int
    space: str  #: whitened or raw, see `States.visual`


@dataclass(frozen=True)
class Nearness:
    """Cosine distance of latents to their own clip's states and to other clips'. Intervals are over videos."""

    own: Estimate
    others: Estimate
    nearer: Estimate  #: how often the own ones are nearer than a random other clip's (a half: no relation)


@dataclass(frozen=True)
class Embeddings:
    projection: Projection
    nearness: dict[str, Nearness | None]  #: to keyframes and thought videos; None: rows have none


def project(states: States, rows: Sequence[Row], seed: int = 0) -> Projection:
    """PCA and t-SNE of the first `SHOWN` clips' frames, keyframes and latents, in the latents' space."""
    places = list({row.video: i for i, row in reversed(list(enumerate(rows)))}.values())
    points: list[Point] = []
    vectors: list[Tensor] = []
    for i in sorted(places)[:SHOWN]:
        kinds = {
            "frame": states.visual(states.frames[i]),
            "keyframe": states.visual(states.keyframes[i]),
            "latent": states.latents[i],
        }
        for kind, vector in kinds.items():
            points += [Point(kind, rows[i].id, at) for at in range(len(vector))]
            vectors.append(vector)
    data = torch.cat(vectors).numpy()
    perplexity = min(30, max(2, len(data) // 4))
    fitted = PCA(2, random_state=seed).fit(data)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(data)
    return Projection(
        points=points,
        pca=np.round(fitted.transform(data), 4).tolist(),
        pca_explained=fitted.explained_variance_ratio_.tolist(),
        tsne=np.round(tsne, 4).tolist(),
        perplexity=perplexity,
        space="whitened" if states.whitened_space else "raw",
    )


def nearness(states: States, rows: Sequence[Row]) -> dict[str, Nearness | None]:
    """How near latents lie to the mean of their clip's keyframes: the number behind Figure 5.

    Also to their thought video, slot by slot, where rows have one.
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
) -> Nearness | None:
    if len({rows[i].video for i in places}) < 2:
        return None
    distance = 1 - F.normalize(queries[places], dim=-1) @ F.normalize(torch.stack(keys), dim=-1).T
    videos = [rows[i].video for i in places]
    other = torch.tensor([[a != b for b in videos] for a in videos])
    own = distance.diagonal()
    others = (distance * other).sum(1) / other.sum(1)
    nearer = ((own[:, None] < distance) * other).sum(1) / other.sum(1)
    return Nearness(*(estimate(values.numpy(), videos) for values in (own, others, nearer)))
