"""All that tables need of a run, counted from its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.records import Record
from storm_vlm.evaluation.run_folder import Run, RunError
from storm_vlm.evaluation.scoring import RULES
from storm_vlm.evaluation.statistics import Estimate, category_estimates, estimate


@dataclass(frozen=True)
class Score:
    """By another rule than ours."""

    accuracy: (
        float | None
    )  #: over all, those without a verdict as wrong: a lower bound; None: no verdict at all
    scored: int  #: how many have a verdict
    rule: str = ""  #: whose it is: "authors", "lmms-eval"; "": a benchmark of one's own, or none
    source: str = ""  #: where that rule was seen


@dataclass(frozen=True)
class Shares:
    """Of some records. An unparsed answer and one that could not be asked are wrong."""

    n: int
    accuracy: Estimate
    unparsed: float
    errors: float
    faults: dict[str, float]  #: of an endpoint's answers, by `Reply.fault`; those that there were
    official: Score
    shares: dict[str, float]  #: means of `Record.shares`: F1 of open answers, IoU of moments


@dataclass(frozen=True)
class Breakdown:
    """By one of a benchmark's ways to group its questions."""

    macro: Estimate  #: the plain mean of the categories
    categories: dict[str, Shares]


@dataclass(frozen=True)
class Timing:
    """Wall time of an item in seconds, over the items that were timed."""

    total: Estimate
    phases: dict[str, float]  #: means


@dataclass(frozen=True)
class RunSummary(Shares):
    benchmark: str
    system: str
    control: str
    n_expected: int
    videos: int
    rules: dict[str, Score]
    groups: dict[str, Breakdown]
    seconds: Timing | None
    # Means over replies; None where there was none.
    rounds: float | None
    tokens: float | None
    prompt_tokens: float | None
    visual_tokens: float | None
    opened: float | None
    slots_used: float | None
    forced_end: float | None


def summarize(run: Run) -> RunSummary:
    """Raises RunError for a run without answers."""
    records = run.records
    if not records:
        raise RunError(f"{run.folder}: no answers yet")
    replies = [record.reply for record in records if record.reply]
    counted = ("rounds", "tokens", "prompt_tokens", "visual_tokens", "opened", "slots_used")
    counts: dict[str, Any] = {name: _mean([getattr(r, name) for r in replies]) for name in counted}
    overall = estimate([record.correct for record in records], run.videos)
    return RunSummary(
        benchmark=run.benchmark,
        system=run.system,
        control=run.control,
        n_expected=run.provenance.get("n_expected", len(records)),
        videos=len(set(run.videos)),
        **vars(_shares(run, records, overall)),
        rules={
            name: _official(run, records)
            if number == 0
            else _score(
                run,
                records,
                [rule(r.reply.text, r) if r.reply else 0.0 for r in records],
                name,
                rule.source,
            )
            for number, (name, rule) in enumerate(RULES.get(run.benchmark, {}).items())
        },
        groups={
            key: _breakdown(run, key)
            for key in dict.fromkeys(key for record in records for key in record.groups)
        },
        seconds=_timing(records),
        **counts,
        forced_end=_mean([reply.forced_end for reply in replies if reply.opened]),
    )


def _shares(run: Run, records: Sequence[Record], accuracy: Estimate) -> Shares:
    n = len(records)
    faults = Counter(r.reply.fault for r in records if r.reply and r.reply.fault)
    return Shares(
        n=n,
        accuracy=accuracy,
        unparsed=sum(not r.parsed and r.error is None for r in records) / n,
        errors=sum(r.error is not None for r in records) / n,
        faults={fault: count / n for fault, count in sorted(faults.items())},
        official=_official(run, records),
        shares={
            measure: mean(r.shares[measure] for r in records if measure in r.shares)
            for measure in dict.fromkeys(measure for r in records for measure in r.shares)
        },
    )


def _official(run: Run, records: Sequence[Record]) -> Score:
    """By the benchmark's first rule, and by its judge where one was asked; what could not be asked is wrong."""
    name, rule = next(iter(RULES.get(run.benchmark, {}).items()), ("", None))
    verdicts = run.judged.verdicts if run.judged else {}
    if run.judged:
        name = f"authors, judged by {run.judged.model}"
    scores = [verdicts.get(r.id, r.official) for r in records]
    if any(score is not None for score in scores):
        scores = [0.0 if r.reply is None else s for r, s in zip(records, scores, strict=True)]
    return _score(run, records, scores, name, rule.source if rule else "")


def _score(
    run: Run, records: Sequence[Record], scores: Sequence[float | None], rule: str, source: str
) -> Score:
    scored = sum(score is not None for score in scores)
    if not scored:
        return Score(None, 0, rule, source)
    given = [score or 0.0 for score in scores]
    if run.benchmark in BENCHMARKS:
        return Score(
            BENCHMARKS[run.benchmark]().official_figure(given, records), scored, rule, source
        )
    return Score(mean(given), scored, rule, source)


def _mean(values: Sequence[float]) -> float | None:
    return mean(map(float, values)) if values else None


def _breakdown(run: Run, key: str) -> Breakdown:
    labels = [record.groups.get(key, "(none)") for record in run.records]
    names = sorted(set(labels))
    members = [[label == name for name in names] for label in labels]
    hits = [record.correct for record in run.records]
    accuracies, macro = category_estimates(hits, members, run.videos)
    shares = {
        name: _shares(
            run, [r for r, label in zip(run.records, labels, strict=True) if label == name], a
        )
        for name, a in zip(names, accuracies, strict=True)
    }
    return Breakdown(macro, shares)


def _timing(records: Sequence[Record]) -> Timing | None:
    timed = [(r.video, r.reply.seconds) for r in records if r.reply and "total" in r.reply.seconds]
    if not timed:
        return None
    spent = [seconds for _, seconds in timed]
    phases = dict.fromkeys(phase for seconds in spent for phase in seconds if phase != "total")
    return Timing(
        estimate([seconds["total"] for seconds in spent], [video for video, _ in timed]),
        {phase: mean(seconds.get(phase, 0.0) for seconds in spent) for phase in phases},
    )
