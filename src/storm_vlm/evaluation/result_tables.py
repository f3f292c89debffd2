"""Runs laid out as the paper's tables: each a `Table`, which every format is written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from storm_vlm.errors import InputError
from storm_vlm.evaluation.benchmarks import BENCHMARKS, GENERAL, REASONING
from storm_vlm.evaluation.compare import SHUFFLED, overall, survives_shuffling
from storm_vlm.evaluation.records import Reliance
from storm_vlm.evaluation.run_folder import Run
from storm_vlm.evaluation.statistics import Estimate
from storm_vlm.evaluation.summary import RunSummary, Score, Shares, summarize
from storm_vlm.evaluation.verdict import verdict

PHASES = ("decode", "vision", "prefill", "latent", "answer", "tool")
PAPER_FILE = Path(__file__).with_name("paper_tables.yaml")


@dataclass(frozen=True)
class Cell:
    """A figure, and what has to be known about it, in smaller print."""

    text: str = "-"
    small: str = ""
    warning: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table; `paper` lines are not ours."""

    cells: tuple[Cell, ...]
    paper: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


def percent(value: float | None) -> str:
    """A share, without the sign."""
    return "-" if value is None else f"{100 * value:.1f}"


def signed(difference: Estimate) -> str:
    """A difference in points, with its interval."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def estimated(share: Estimate | None, small: str = "", warning: bool = False) -> Cell:
    """A mean with its interval."""
    if share is None:
        return Cell()
    text = f"{percent(share.mean)} [{percent(share.low)}, {percent(share.high)}]"
    return Cell(text, small, warning)


@dataclass(frozen=True)
class Measured:
    """Runs and their summaries, by system, benchmark and control ("": none)."""

    runs: dict[tuple[str, str, str], Run]
    summaries: dict[tuple[str, str, str], RunSummary]

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(system for system, _, _ in self.runs))

    @property
    def benchmarks(self) -> list[str]:
        measured = {benchmark for _, benchmark, _ in self.runs}
        return [b for b in BENCHMARKS if b in measured] + sorted(measured - BENCHMARKS.keys())

    def get(self, system: str, benchmark: str, control: str = "") -> RunSummary | None:
        return self.summaries.get((system, benchmark, control))


def measure(runs: Sequence[Run]) -> Measured:
    """Runs of equal system, benchmark and control are told apart by their folders' names."""
    kept: dict[tuple[str, str, str], Run] = {}
    for run in runs:
        system = run.system
        if (system, run.benchmark, run.control) in kept:
            system = f"{system} ({run.folder.name})"
        if (system, run.benchmark, run.control) in kept:
            raise InputError(f"{run.folder} is given twice")
        kept[system, run.benchmark, run.control] = run
    return Measured(kept, {key: summarize(run) for key, run in kept.items()})


def build_tables(measured: Measured, with_paper: bool = False) -> list[Table]:
    """The paper's Tables 1, 2 and 4 with our lines; gains, controls, latent reliance and categories."""
    paper = yaml.safe_load(PAPER_FILE.read_text(encoding="utf-8")) if with_paper else {}
    layout = {
        caption: [name for name, benchmark in BENCHMARKS.items() if benchmark.table == caption]
        for caption in (GENERAL, REASONING)
    }
    tables = [_main(measured, caption, names, paper) for caption, names in layout.items()]
    others = [b for b in measured.benchmarks if not any(b in names for names in layout.values())]
    tables.append(_main(measured, "Other benchmarks", others, {}))
    tables += [_gains(measured), _controls(measured), _reliance(measured)]
    tables.append(_latency(measured, paper))
    tables += [t for benchmark in measured.benchmarks for t in _categories(measured, benchmark)]
    return [table for table in tables if table.lines]


def title(benchmark: str) -> str:
    return BENCHMARKS[benchmark].title if benchmark in BENCHMARKS else benchmark


def _name(system: str) -> Cell:
    reasoner, _, model = system.partition(" · ")
    return Cell(reasoner, model)


def _main(measured: Measured, name: str, benchmarks: Sequence[str], paper: dict[str, Any]) -> Table:
    lines = [
        Line((_name(system), *(_score(measured.get(system, b)) for b in benchmarks)))
        for system in measured.systems
        if any(measured.get(system, b) for b in benchmarks)
    ]
    general = paper.get("general", {})
    notes = [note for b in ("all", *benchmarks) for note in general.get(b, ())]
    for row in paper.get("rows", ()):
        if any(b in row for b in benchmarks):
            remarks = [row["notes"][b] for b in benchmarks if b in row.get("notes", {})]
            source = paper["sources"][row["source"]] if remarks else ""
            notes += [
                f"* {row['model']}, {row['frames']} frames: {note} ({source})." for note in remarks
            ]
            lines.append(_paper_line(row, benchmarks, " *" if remarks else ""))
    return Table(name, ("system", *map(title, benchmarks)), lines, notes)


def _paper_line(row: dict[str, Any], benchmarks: Sequence[str], mark: str) -> Line:
    frames = f"{row['frames']} frames"
    if "printed" in row:
        frames += f", not {row['printed']} as printed"
    label = f"{frames}; {'not in the paper' if row.get('added') else 'paper'}"
    figures = (Cell(str(row[b])) if b in row else Cell() for b in benchmarks)
    return Line((Cell(row["model"] + mark, label), *figures), paper=True)


def _score(summary: RunSummary | None) -> Cell:
    if summary is None:
        return Cell()
    n, expected, official = summary.n, summary.n_expected, summary.official
    small = [f"n {n:,}" if n == expected else f"only {n:,} of {expected:,}"]
    shares = {"unparsed": summary.unparsed, **summary.faults}
    if summary.errors:
        shares["errors"] = summary.errors
    small += [f"{name.replace('_', ' ')} {percent(share)}%" for name, share in shares.items()]
    small += [f"mean {name} {percent(share)}" for name, share in summary.shares.items()]
    if said := _official(official, n):
        small.append(said)
    for name, score in list(summary.rules.items())[1:]:  # the first is the official one
        small.append(_ruled(f"{name} rule", score, n))
    odd = n != expected or summary.errors > 0 or bool(summary.faults)
    return estimated(summary.accuracy, " · ".join(small), odd)


def _official(score: Score, n: int) -> str:
    if score.accuracy is None and not score.rule:
        return ""
    return _ruled(f"official ({score.rule})" if score.rule else "official", score, n)


def _ruled(name: str, score: Score, n: int) -> str:
    """A figure by another rule; where that has no verdict on some, what it is at least."""
    if score.accuracy is None:
        return f"{name}: needs a judge"
    some = "" if score.scored == n else f", no verdict on {n - score.scored:,}"
    return f"{name} {'at least ' if some else ''}{percent(score.accuracy)}{some}"


def _gains(measured: Measured) -> Table:
    """Against the first system; each with what is left of it when the frames are shuffled."""
    base, *others = measured.systems
    benchmarks = [b for b in measured.benchmarks if any(measured.get(s, b) for s in others)]
    benchmarks = [b for b in benchmarks if measured.get(base, b)]
    lines = [
        Line((_name(system), *(_gain(measured, system, base, b) for b in benchmarks)))
        for system in others
        if any(measured.get(system, b) for b in benchmarks)
    ]
    notes = [
        "Paired on the same questions; intervals are over videos. A gain that is as large when every model "
        "sees the frames in no order (no loss beyond its interval) is marked not temporal."
    ]
    return Table(f"Gain over {base}, points", ("system", *map(title, benchmarks)), lines, notes)


def _gain(measured: Measured, system: str, base: str, benchmark: str) -> Cell:
    ours, theirs = (measured.runs.get((s, benchmark, "")) for s in (system, base))
    if ours is None or theirs is None:
        return Cell()
    gain = overall([ours], [theirs])
    small = [f"right: only it {gain.only_ours}, only the other {gain.only_theirs}"]
    shuffled = [measured.runs.get((s, benchmark, SHUFFLED)) for s in (system, base)]
    warning = False
    if shuffled[0] and shuffled[1]:
        beside = survives_shuffling(ours, theirs, shuffled[0], shuffled[1])
        small.append(f"shuffled {signed(beside.shuffled)}")
        if beside.not_temporal is not None:
            warning = beside.not_temporal
            small.append("not temporal" if warning else f"lost {signed(beside.loss)}")
    return Cell(signed(gain.difference), " · ".join(small), warning)


def _controls(measured: Measured) -> Table:
    """Each system with the evidence taken away, and what that costs it."""
    columns = list(dict.fromkeys(control for _, _, control in measured.runs if control))
    lines: list[Line] = []
    for system in measured.systems:
        for benchmark in measured.benchmarks:
            keys = [(system, benchmark, control) for control in columns]
            if any(key in measured.runs for key in keys):
                cells = (_control(measured, key) for key in keys)
                as_asked = _score(measured.get(system, benchmark))
                lines.append(
                    Line((_name(system), Cell(title(benchmark)), Cell(as_asked.text), *cells))
                )
    names = (column.replace("_", " ") for column in columns)
    return Table("Controls", ("system", "benchmark", "as asked", *names), lines)


def _control(measured: Measured, key: tuple[str, str, str]) -> Cell:
    full, summary = measured.runs.get((*key[:2], "")), measured.summaries.get(key)
    if summary is None or full is None:
        return Cell(percent(summary.accuracy.mean if summary else None))
    return estimated(summary.accuracy, signed(overall([measured.runs[key]], [full]).difference))


def _reliance(measured: Measured) -> Table:
    """What each system's answers owe to its latents: a line for each run in which that was measured."""
    lines = [
        Line((_name(system), Cell(title(benchmark)), *_relied(run.reliance)))
        for (system, benchmark, _), run in measured.runs.items()
        if run.reliance
    ]
    columns = (
        *("system", "benchmark", "own latents", "another clip's", "difference"),
        *("answers follow", "no slots", "n"),
    )
    notes = [
        "Accuracy of greedy answers when the slots are fed the clip's own latents or those of another clip that "
        "has another answer; the difference, in points, is paired, and marked where the latents are not shown to "
        "matter. Answers follow where they become that clip's.",
        *(
            f"{system}, {title(benchmark)}: {verdict(run.reliance).text}"
            for (system, benchmark, _), run in measured.runs.items()
            if run.reliance
        ),
    ]
    return Table("Latent reliance", columns, lines, notes)


def _relied(measured: Reliance) -> tuple[Cell, ...]:
    own, swap, removed = (
        measured.interventions[kind] for kind in ("own", "swap_other_answer", "removed")
    )
    assert swap.accuracy and swap.follows_own  # reliance is not measured without them
    unshown = not verdict(measured).matter
    given = swap.accuracy.n
    return (
        estimated(own.accuracy),
        estimated(swap.accuracy, "" if given == measured.n else f"n {given:,}"),
        Cell(signed(-measured.reliance), "not shown to matter" if unshown else "", unshown),
        estimated(swap.follows, f"{percent(swap.follows_own.mean)} with own"),
        estimated(removed.accuracy),
        Cell(
            f"{measured.n:,}",
            f"of {measured.drawn_from:,}" if measured.drawn_from > measured.n else "",
        ),
    )


def _latency(measured: Measured, paper: dict[str, Any]) -> Table:
    """Seconds per item, and how many times the first system's on the same benchmark."""
    lines: list[Line] = []
    timings = [summary.seconds for summary in measured.summaries.values() if summary.seconds]
    phases = [phase for phase in PHASES if any(phase in timing.phases for timing in timings)]
    for benchmark in measured.benchmarks:
        first = None
        for system in measured.systems:
            summary = measured.get(system, benchmark)
            if summary is None or summary.seconds is None:
                continue
            total, means = summary.seconds.total, summary.seconds.phases
            first = first or total.mean
            interval = f"{total.mean:.3g} [{total.low:.3g}, {total.high:.3g}]"
            cells = (
                _name(system),
                Cell(title(benchmark)),
                Cell(interval, f"n {total.n:,}"),
                *(Cell(f"{total.mean / first:.2f}x"), Cell(f"{1 / total.mean:.3g}")),
                *(Cell(f"{means[p]:.3g}" if p in means else "-") for p in phases),
                Cell(f"{summary.tokens:.1f}", f"slots {summary.slots_used:.1f}"),
            )
            lines.append(Line(cells))
    latency = paper.get("latency", {"rows": ()})
    for row in latency["rows"]:
        figures = (Cell(str(row["seconds"])), Cell(), Cell(str(row["items_per_second"])))
        gaps = (Cell(),) * (len(phases) + 1)
        name = Cell(row["model"], "paper")
        lines.append(Line((name, Cell("MMVU"), *figures, *gaps), paper=True))
    columns = (
        "system",
        "benchmark",
        "s per item",
        "ratio",
        "items per s",
        *phases,
        "tokens written",
    )
    notes = ["Wall time by phase in seconds, means over items. Ratios are within one benchmark."]
    return Table(
        "Table 4: latency", columns, lines, notes + [n for n in [latency.get("note")] if n]
    )


def _categories(measured: Measured, benchmark: str) -> list[Table]:
    """A table for each way in which the benchmark is broken down."""
    systems = [s for s in measured.systems if measured.get(s, benchmark)]
    summaries = [measured.summaries[s, benchmark, ""] for s in systems]
    tables: list[Table] = []
    for key in dict.fromkeys(key for summary in summaries for key in summary.groups):
        groups = [summary.groups.get(key) for summary in summaries]
        names = dict.fromkeys(name for group in groups if group for name in group.categories)
        lines = [
            Line((Cell(name), *(_category(g and g.categories.get(name)) for g in groups)))
            for name in names
        ]
        macro = (estimated(group.macro if group else None) for group in groups)
        lines.append(Line((Cell("mean of these (macro)"), *macro)))
        words = key.replace("_", " ")
        tables.append(Table(f"{title(benchmark)} by {words}", (words, *systems), lines))
    return tables


def _category(shares: Shares | None) -> Cell:
    if shares is None:
        return Cell()
    small = f"n {shares.n:,} · unparsed {percent(shares.unparsed)}%"
    if said := _official(shares.official, shares.n):
        small += f" · {said}"
    return estimated(shares.accuracy, small)
