"""What a validity suite comes to, in plain words. The rules, and where they are from, are in `docs/validity.md`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from storm_vlm.evaluation.records import Probes, Reliance
from storm_vlm.evaluation.statistics import Estimate

FEW = 100  # clips; with fewer, intervals are wide, and those of very few too narrow
CEILING = 0.95  # own accuracy that leaves an oracle no room
STILL = 0.1  # of their spread; latents that move less with the clip do not look at it
Weight = Literal["dependence", "benefit", "reservation"]


@dataclass(frozen=True)
class Finding:
    """A known failure, whether it shows here, and the figures. `weight`: what it costs the verdict if it does."""

    failure: str
    shows: bool
    figures: str
    weight: Weight


@dataclass(frozen=True)
class Verdict:
    text: str
    matter: bool  #: the answers depend on the latents, and are better for them
    findings: tuple[Finding, ...]


def verdict(reliance: Reliance, probes: Probes | None = None) -> Verdict:
    """By the rules: no evidence, if a finding on dependence shows; no benefit, if one on benefit does."""
    findings = tuple(_findings(reliance, probes))
    shown: dict[Weight, list[str]] = {"dependence": [], "benefit": [], "reservation": []}
    for finding in findings:
        if finding.shows:
            shown[finding.weight].append(f"{finding.failure} ({finding.figures})")
    cost, reasons = reliance.reliance, "; ".join(shown["dependence"] or shown["benefit"])
    if shown["dependence"]:
        text = f"No evidence that the latents matter: {reasons}."
        if (width := 50 * (cost.high - cost.low)) >= 1:
            text += f" With {reliance.n} rows, less than about {width:.0f} points would not show."
    elif shown["benefit"]:
        text = f"The answers follow the latents, but there is no evidence that they are better for it: {reasons}."
    else:
        text = f"The latents matter: another clip's cost {_points(cost)} points."
        if shown["reservation"]:
            text += f" Reservations, which these rows cannot rule out: {'; '.join(shown['reservation'])}."
    if reliance.videos < FEW:
        text = f"Only {reliance.videos} clips, which are few. {text}"
    return Verdict(text, not (shown["dependence"] or shown["benefit"]), findings)


def _findings(reliance: Reliance, probes: Probes | None) -> Iterator[Finding]:
    cost = reliance.reliance
    yield Finding(
        "ignored latents",
        cost.low <= 0,
        f"another clip's cost {_points(cost)} points",
        "dependence",
    )
    swap = reliance.interventions["swap_other_answer"]
    if swap.follows and swap.follows_own and swap.follows_more:
        figures = f"{swap.follows.mean:.1%} of answers become that clip's, {swap.follows_own.mean:.1%} by accident"
        yield Finding("answers do not follow", swap.follows_more.low <= 0, figures, "dependence")
    yield from _as_good(reliance, "matched_random", "any state of the slots will do", "dependence")
    yield from _as_good(reliance, "removed", "marker effect", "benefit")
    yield from _as_good(reliance, "pause", "more computation alone", "benefit")
    yield from _as_good(reliance, "no_markers", "no segment is needed", "benefit")
    yield from _as_good(reliance, "mean", "collapse over clips", "reservation")
    yield from _as_good(reliance, "first_repeat", "collapse over slots", "reservation")
    own, oracle = (reliance.interventions.get(kind) for kind in ("own", "oracle"))
    if own and own.accuracy and oracle and oracle.difference:
        gain = oracle.difference
        no_better = gain.low <= 0 and own.accuracy.mean < CEILING
        figures = f"it gains {_points(gain)} points over own"
        yield Finding("the oracle is no better", no_better, figures, "reservation")
    moved = reliance.sensitivity.clip
    figures = f"latents move {moved.mean:.2f} of their spread with the clip"
    yield Finding("blind latents", moved.high < STILL, figures, "reservation")
    if probes:
        chance, text = probes.over_shuffled, probes.over_text
        figures = f"slots {probes.slots.mean:.1%}, text {probes.text.mean:.1%}, shuffled {probes.shuffled.mean:.1%}"
        unread = chance.low <= 0 or text.mean <= 0
        yield Finding("the answer is not in the slots", unread, figures, "reservation")
    if probes and probes.cosine:
        figures = f"alignment cosine and right answers correlate at {probes.cosine.mean:+.2f}"
        yield Finding("cosine misleads", probes.cosine.high < 0, figures, "reservation")


def _as_good(reliance: Reliance, kind: str, failure: str, weight: Weight) -> Iterator[Finding]:
    """A replacement that costs nothing beyond its interval."""
    line = reliance.interventions.get(kind)
    if line and line.difference:
        cost = -line.difference
        yield Finding(
            failure,
            cost.low <= 0,
            f"{line.what.split(':')[0]} costs {_points(cost)} points",
            weight,
        )


def _points(difference: Estimate) -> str:
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.mean:.1f} ({low:.1f} to {high:.1f})"
