"""From outcomes of runs to the lines of the paper's tables, with intervals over seeds and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from storm_vlm.evaluation.statistics import paired_difference
from storm_vlm.world.arms import ARMS, Comparison

Result = dict[str, Any]
TAMPERED = ("own", "swap_other_answer", "noise", "shuffle", "mean", "zero", "removed")


def table(comparison: Comparison, results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """`lines`: of each arm its name and what `line` finds, or nothing where it has no run yet."""
    reference = results.get(comparison.reference, ())
    return {
        "title": comparison.title,
        "paper": comparison.paper,
        "reference": comparison.name(comparison.reference),
        "lines": [
            {
                "arm": arm,
                "name": comparison.name(arm),
                **line(results.get(arm, ()), () if arm == comparison.reference else reference),
            }
            for arm in comparison.arms
        ],
    }


def line(runs: Sequence[Result], reference: Sequence[Result]) -> dict[str, Any]:
    """What an arm's runs, one for each seed, have to show.

    `accuracy` and `harder`, the split with two balls and longer chains; `behind`: `reference` minus this, seed by
    seed; `tampered`: accuracy by what is fed into the slots (None: no slots), and how often the answer became the
    donor's; `tokens` and `slots` of an answer. An arm that is not trained has one run, which stands for every seed.
    """
    if not runs:
        return {"seeds": [], "accuracy": None}
    found: dict[str, Any] = {
        "seeds": [run["seed"] for run in runs],
        "accuracy": over_seeds([hits(run["test"]) for run in runs]),
        "by_seed": [float(np.mean(hits(run["test"]))) for run in runs],
        "harder": over_seeds([hits(run["ood"]) for run in runs]),
        "behind": _behind(runs, reference),
        "tokens": float(np.mean([o["tokens"] for run in runs for o in run["test"]])),
        "slots": float(np.mean([o["slots_used"] for run in runs for o in run["test"]])),
        "tampered": None,
    }
    if ARMS[runs[0]["arm"]].latent:
        tampered = [run["tampered"] for run in runs]
        found["tampered"] = {
            kind: over_seeds([_known(of["right"][kind]) for of in tampered]) for kind in TAMPERED
        }
        found["tampered"]["follows"] = over_seeds([_known(of["follows"]) for of in tampered])
    return found


def over_seeds(outcomes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean of (seeds, questions) outcomes with its 95% interval: both seeds and questions are drawn again."""
    values = np.asarray(outcomes, float)
    return {**paired_difference(values, np.zeros_like(values)), "n": values.size}


def hits(outcomes: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 for a right answer; what could not be parsed is wrong."""
    return [float(bool(outcome["correct"])) for outcome in outcomes]


def _known(outcomes: Sequence[bool | None]) -> list[float]:
    return [float(hit) for hit in outcomes if hit is not None]


def _behind(runs: Sequence[Result], reference: Sequence[Result]) -> dict[str, float] | None:
    ours = {run["seed"]: hits(run["test"]) for run in runs}
    if not ARMS[runs[0]["arm"]].trained:
        ours = {run["seed"]: hits(runs[0]["test"]) for run in reference}
    shared = [run for run in reference if run["seed"] in ours]
    if not shared:
        return None
    return paired_difference(
        [hits(run["test"]) for run in shared], [ours[run["seed"]] for run in shared]
    )
