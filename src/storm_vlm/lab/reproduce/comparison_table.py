"""From outcomes of runs to the lines of a table, with intervals over seeds and questions."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storm_vlm.evaluation.statistics import Estimate, accuracy, mean_over_seeds, paired_difference
from storm_vlm.lab.arms import ARMS, Comparison
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.experiment import CONTROLS, Result, hits
from storm_vlm.lab.world.mirrors import draw_scenes, shortcuts
from storm_vlm.lab.world.questions import REASONING_SHARE, answers

NOT_IN_PAPER = "not in the paper"
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Behind:
    """A mean difference with its interval, over the seeds that both have."""

    mean: float
    low: float
    high: float
    seeds: int


def comparison_table(
    comparison: Comparison, results: Mapping[str, Sequence[Result]], rehearsal: bool = False
) -> dict[str, Any]:
    """`lines`: of each arm its name, what it is set against, whether the paper agrees, and `measured_line`.

    A rehearsal has learned nothing, so nothing of it is set beside the paper.
    """
    lines = []
    for arm in comparison.arms:
        other = comparison.against(arm)
        line = measured_line(results.get(arm, ()), results.get(other or "", ()))
        verdict = "" if rehearsal else paper_agrees(line["behind"], arm in comparison.claimed)
        named = {"arm": arm, "name": comparison.name(arm), "against": other}
        lines.append({**named, **line, "paper_agrees": verdict})
    return {
        **{key: getattr(comparison, key) for key in ("title", "paper", "paragraph")},
        "lines": lines,
    }


def paper_agrees(behind: Behind | None, claimed: bool) -> str:
    """Whether the reference is ahead here as the paper says it is; "" where nothing can be said.

    A difference counts only if its interval leaves out zero.
    """
    if behind is None:
        return ""
    if not claimed:
        return NOT_IN_PAPER
    return "yes" if behind.low > 0 else "no" if behind.high < 0 else NO_DIFFERENCE


def measured_line(runs: Sequence[Result], against: Sequence[Result]) -> dict[str, Any]:
    """What an arm's runs, one for each seed, have to show.

    `accuracy` and `harder`, the split with two balls and longer chains; `behind`: `against` minus this, over the
    `seeds` that both have; `tampered`: accuracy by what is fed into the slots (None: it has no latents), and how
    often the answer became the donor's, with the donor's latents (`follows`) and by accident (`follows_own`);
    `tokens` and `slots` of an answer. An arm that is not trained has one run, which stands for every seed.
    """
    if not runs:
        return {"seeds": [], "accuracy": None, "behind": None}
    line: dict[str, Any] = {
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
        kinds = [kind for kind in tampered[0]["right"] if all(kind in t["right"] for t in tampered)]
        rights = {kind: _known([outcome["right"][kind] for outcome in tampered]) for kind in kinds}
        follows = {
            name: _known([run[name] for run in tampered]) for name in ("follows", "follows_own")
        }
        line["tampered"] = rights | follows
    return line


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
    difference = paired_difference(theirs, [ours[run["seed"]] for run in shared])
    return Behind(difference.mean, difference.low, difference.high, len(shared))


def read_tables(record: str) -> dict[str, Any]:
    """The JSON of `reproduce.json`, with its estimates."""

    def typed(node: dict[str, Any]) -> Any:
        for kind in (Estimate, Behind):
            if node.keys() == kind.__dataclass_fields__.keys():
                return kind(**node)
        return node

    return json.loads(record, object_hook=typed)


def reference_scores(train_rows: int, test_rows: int, sft: Sequence[Result]) -> dict[str, Any]:
    """What an accuracy is to be held against: `shortcuts` that simulate nothing, `chance`, and `perception`.

    The last shortcuts ask the SFT models without the evidence.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, (question,) in draw_scenes("reasoning", "train", train_rows, 0):
        counts[question.family][question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, (question,) in draw_scenes("reasoning", "test", test_rows, 0):
        majority = counts[question.family].most_common(1)
        guesses = {"majority": majority[0][0] if majority else "", **shortcuts(scene, question)}
        for name, guess in guesses.items():
            right[name].append(guess == question.answer)
    found = {name: accuracy(outcomes) for name, outcomes in right.items()}
    for control in CONTROLS if sft else ():
        found[control] = accuracy([hit for run in sft for hit in run[control]])
    perception = json.loads((shipped("backbone") / "perception.json").read_text())
    return {
        "shortcuts": found,
        "chance": sum(share / len(answers(family)) for family, share in REASONING_SHARE.items()),
        "perception": {scenes: perception[scenes] for scenes in ("one", "all")},
    }
