"""Two methods on the same questions: how much they differ, how sure that is, and whether it is about time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storm_vlm.errors import InputError
from storm_vlm.evaluation.run_folder import Run
from storm_vlm.evaluation.statistics import Estimate, only_right, paired_difference

SHUFFLED = "shuffled_frames"


def hits(runs: Sequence[Run], like: Run) -> NDArray[np.float64]:
    """Right or wrong, (seeds, rows), in the order of `like`'s records.

    Raises InputError where a run is about another benchmark, other questions or other answers.
    """
    answers = {record.id: record.answer for record in like.records}
    outcomes = []
    for run in runs:
        if run.benchmark != like.benchmark:
            raise InputError(
                f"{run.folder} is {run.benchmark}, {like.folder} is {like.benchmark}: compare like with like"
            )
        records = {record.id: record for record in run.records}
        if odd := sorted(records.keys() ^ answers.keys()):
            raise InputError(
                f"{run.folder} and {like.folder} are about different questions: {len(odd)} are in one "
                f"only, as {odd[0]!r}; let both finish, or run both on the same rows"
            )
        if odd := [id for id, answer in answers.items() if records[id].answer != answer]:
            raise InputError(f"{run.folder} and {like.folder} differ in the answer of {odd[0]!r}")
        outcomes.append([float(records[id].correct) for id in answers])
    return np.array(outcomes)


@dataclass(frozen=True)
class Gain:
    """Of ours over theirs, on the same questions. Intervals are over videos."""

    n: int
    ours: float
    theirs: float
    difference: Estimate
    only_ours: int  #: right, where theirs is wrong
    only_theirs: int


@dataclass(frozen=True)
class RunComparison(Gain):
    benchmark: str
    seeds: int
    videos: int
    groups: dict[str, dict[str, Gain]]
    differs: dict[str, tuple[Any, Any]]  #: what the runs say differently about how they were made


@dataclass(frozen=True)
class ShuffledGain:
    """A gain beside the gain under shuffled frames."""

    gain: Estimate
    shuffled: Estimate
    loss: Estimate  #: the first less the second, question by question

    @property
    def not_temporal(self) -> bool | None:
        """Whether a gain beyond its interval has no such loss; None: there is no gain to ask this about."""
        return None if self.gain.low <= 0 else self.loss.low <= 0


def overall(ours: Sequence[Run], theirs: Sequence[Run]) -> Gain:
    """Ours minus theirs over all questions, as `compare` without its groups."""
    a, b = _paired(ours, theirs)
    return _gain(a, b, theirs[0].videos, np.ones(a.shape[1], bool))


def compare(ours: Sequence[Run], theirs: Sequence[Run]) -> RunComparison:
    """Ours minus theirs, in all and by group.

    Each side is one run, or one for each seed (a single one stands for every seed).
    """
    first = theirs[0]
    a, b = _paired(ours, theirs)
    groups: dict[str, dict[str, Gain]] = {}
    for key in dict.fromkeys(key for record in first.records for key in record.groups):
        labels = np.array([record.groups.get(key, "(none)") for record in first.records])
        groups[key] = {
            str(label): _gain(a, b, first.videos, labels == label) for label in np.unique(labels)
        }
    return RunComparison(
        **vars(_gain(a, b, first.videos, np.ones(a.shape[1], bool))),
        benchmark=first.benchmark,
        seeds=len(a),
        videos=len(set(first.videos)),
        groups=groups,
        differs=differences(ours[0].provenance, first.provenance),
    )


def _paired(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[NDArray, NDArray]:
    if len(ours) != len(theirs) and 1 not in (len(ours), len(theirs)):
        raise InputError(
            f"{len(ours)} runs cannot be paired with {len(theirs)}: give as many seeds"
        )
    a, b = np.broadcast_arrays(hits(ours, theirs[0]), hits(theirs, theirs[0]))
    return a, b


def _gain(a: NDArray, b: NDArray, videos: Sequence[str], member: NDArray) -> Gain:
    clusters = [video for video, here in zip(videos, member, strict=True) if here]
    ours, theirs = a[:, member], b[:, member]
    only_ours, only_theirs = only_right(ours, theirs)
    return Gain(
        n=int(member.sum()),
        ours=float(ours.mean()),
        theirs=float(theirs.mean()),
        difference=paired_difference(ours, theirs, clusters, 2000),
        only_ours=only_ours,
        only_theirs=only_theirs,
    )


def survives_shuffling(
    ours: Run, theirs: Run, ours_shuffled: Run, theirs_shuffled: Run
) -> ShuffledGain:
    """Whether a gain is as large when the frames come in no order: then it is not about time."""
    a, b, c, d = (hits([run], theirs)[0] for run in (ours, theirs, ours_shuffled, theirs_shuffled))
    pairs = (a, b), (c, d), (a - b, c - d)
    return ShuffledGain(*(paired_difference(*pair, theirs.videos, 2000) for pair in pairs))


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two provenances say differently about how runs were made, by dotted name."""
    came_out = ("summary", "seconds")
    a, b = (_flat({k: v for k, v in run.items() if k not in came_out}) for run in (ours, theirs))
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys((*a, *b)) if a.get(k) != b.get(k)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
        leaves |= inner
    return leaves
