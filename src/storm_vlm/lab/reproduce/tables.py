"""From outcomes of runs to the lines of the paper's tables, with intervals over seeds and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storm_vlm.analysis.reliance import KINDS
from storm_vlm.evaluation.statistics import Estimate, mean_over_seeds, paired_difference
from storm_vlm.lab.arms import ARMS, Comparison
from storm_vlm.lab.experiment import Result, hits


@dataclass(frozen=True)
class Behind:
    """A mean difference with its interval, over the seeds that both have."""

    mean: float
    low: float
    high: float
    seeds: int


def table(comparison: Comparison, results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """`lines`: of each arm its name, what it is set against, and what `line` finds, if it has a run yet."""
    lines = []
    for arm in comparison.arms:
        other = comparison.against(arm)
        found = line(results.get(arm, ()), results.get(other or "", ()))
        named = {"arm": arm, "name": comparison.name(arm), "against": other}
        lines.append({**named, **found})
    return {"title": comparison.title, "paper": comparison.paper, "lines": lines}


def line(runs: Sequence[Result], against: Sequence[Result]) -> dict[str, Any]:
    """What an arm's runs, one for each seed, have to show.

    `accuracy` and `harder`, the split with two balls and longer chains; `behind`: `against` minus this, over the
    `seeds` that both have; `tampered`: accuracy by what is fed into the slots (None: it has no latents), and how
    often the answer became the donor's, with the donor's latents (`follows`) and by accident (`follows_own`);
    `tokens` and `slots` of an answer. An arm that is not trained has one run, which stands for every seed.
    """
    if not runs:
        return {"seeds": [], "accuracy": None, "behind": None}
    found: dict[str, Any] = {
        "seeds": [run["seed"] for run in runs],
        "accuracy": mean_over_seeds([hits(run["test"]) for run in runs]),
        "by_seed": [float(np.mean(hits(run["test"]))) for run in runs],
        "harder": mean_over_seeds([hits(run["ood"]) for run in runs]),
        "behind": _behind(runs, against),
        "tokens": float(np.mean([o["tokens"] for run in runs for o in run["test"]])),
        "slots": float(np.mean([o["slots_used"] for run in runs for o in run["test"]])),
        "tampered": None,
    }
    if ARMS[runs[0]["arm"]].latent:
        tampered = [run["tampered"] for run in runs]
        rights = {kind: _known([of["right"][kind] for of in tampered]) for kind in KINDS}
        follows = {of: _known([run[of] for run in tampered]) for of in ("follows", "follows_own")}
        found["tampered"] = rights | follows
    return found


def _known(outcomes: Sequence[Sequence[bool | None]]) -> Estimate | None:
    """Over seeds, without rows that have no donor (the same ones in every run); None if no row has one."""
    known = [[float(hit) for hit in run if hit is not None] for run in outcomes]
    return mean_over_seeds(known) if known[0] else None


def _behind(runs: Sequence[Result], against: Sequence[Result]) -> Behind | None:
    ours = {run["seed"]: hits(run["test"]) for run in runs}
    if not ARMS[runs[0]["arm"]].trained:
        ours = {run["seed"]: hits(runs[0]["test"]) for run in against}
    shared = [run for run in against if run["seed"] in ours]
    if not shared:
        return None
    theirs = [hits(run["test"]) for run in shared]
    found = paired_difference(theirs, [ours[run["seed"]] for run in shared])
    return Behind(found.mean, found.low, found.high, len(shared))
