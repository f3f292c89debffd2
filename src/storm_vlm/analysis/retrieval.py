"""Same-video retrieval: do two questions about one clip have latents that are alike? (paper, Figures 6 to 8)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from storm_vlm.analysis.states import States
from storm_vlm.data.row import Row
from storm_vlm.evaluation.statistics import Estimate, estimate


@dataclass(frozen=True)
class Retrieval:
    """How well rows find another row of their own video. Intervals are over videos."""

    queries: int
    videos: int
    ranked: int  #: rows that each query looks through
    representations: dict[str, dict[str, Estimate]]  #: hit@1, hit@5 and mrr (Figure 6)
    per_query: dict[str, list[Any]]  #: `id`, and by representation the reciprocal rank (Figure 7)
    slots: dict[str, dict[str, Estimate]]  #: mrr by which slots stand for a row (Figure 8)


def retrieval(states: States, rows: Sequence[Row], seed: int = 0) -> Retrieval | None:
    """Of latent, text and random representations, and of the latents by slot.

    A query is a row; all other rows are ranked by cosine, less the mean of all rows. A row that is alone with its
    video has nothing to find and is no query, but is among what is ranked; None if there is no query.
    """
    videos = [row.video for row in rows]
    queries = [i for i, video in enumerate(videos) if videos.count(video) > 1]
    if not queries or len(set(videos)) < 2:
        return None
    latents = states.latents
    random = torch.randn(latents[:, 0].shape, generator=torch.Generator().manual_seed(seed))
    kinds = {"latent": latents.mean(1), "text": states.text, "random": random}
    ranks = {name: first_ranks(r, r, videos, queries) for name, r in kinds.items()}
    where = [videos[i] for i in queries]
    by_slot = slot_ranks(latents, videos, queries)
    return Retrieval(
        queries=len(queries),
        videos=len(set(where)),
        ranked=len(rows) - 1,
        representations={name: _scores(rank, where) for name, rank in ranks.items()},
        per_query={
            "id": [rows[i].id for i in queries],
            **{name: (1 / rank).tolist() for name, rank in ranks.items()},
        },
        slots={name: {"mrr": _scores(rank, where)["mrr"]} for name, rank in by_slot.items()},
    )


def slot_ranks(latents: Tensor, videos: Sequence[str], queries: Sequence[int]) -> dict[str, Tensor]:
    """First ranks by which of K slots stand for a row: their mean, one left out, one alone, or all side by side
    with the query's in reversed order (the mean does not know an order)."""
    pooled = {"mean of all slots": latents.mean(1)}
    budget = latents.shape[1]
    for k in range(budget if budget > 1 else 0):
        pooled[f"without {k + 1}"] = latents[:, [s for s in range(budget) if s != k]].mean(1)
    pooled |= {f"slot {k + 1} alone": latents[:, k] for k in range(budget)}
    pooled["side by side"] = latents.flatten(1)
    ranks = {name: first_ranks(r, r, videos, queries) for name, r in pooled.items()}
    turned = latents.flip(1).flatten(1)
    return ranks | {"reversed": first_ranks(turned, latents.flatten(1), videos, queries)}


def first_ranks(
    queried: Tensor, ranked: Tensor, videos: Sequence[str], queries: Sequence[int]
) -> Tensor:
    """Rank (queries,), from 1, of the first other row of the query's video; both representations are (N, D).

    Of rows that are equally near, those of other videos come first: a constant representation finds nothing.
    """
    centred = [F.normalize(r - r.mean(0), dim=-1) for r in (queried, ranked)]
    alike = centred[0][list(queries)] @ centred[1].T  # (queries, N)
    number = {video: i for i, video in enumerate(dict.fromkeys(videos))}
    video = torch.tensor([number[v] for v in videos])
    same = video[list(queries)][:, None] == video
    itself = torch.zeros_like(same)
    itself[torch.arange(len(queries)), list(queries)] = True
    best = alike.masked_fill(~same | itself, -torch.inf).amax(1, keepdim=True)
    return ((alike >= best) & ~same).sum(1) + 1


def _scores(ranks: Tensor, videos: Sequence[str]) -> dict[str, Estimate]:
    return {
        "hit@1": estimate((ranks <= 1).numpy(), videos),
        "hit@5": estimate((ranks <= 5).numpy(), videos),
        "mrr": estimate((1 / ranks).numpy(), videos),
    }
