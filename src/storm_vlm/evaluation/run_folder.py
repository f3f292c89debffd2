"""A run on disk: `run.json` says how it was made, `answers-*.jsonl` hold its records, `reliance.json` (of STORM only)
says what its answers owe to the latents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from storm_vlm.errors import AccessError, StormError
from storm_vlm.evaluation.records import Record, Reliance
from storm_vlm.evaluation.scoring import RULES
from storm_vlm.evaluation.statistics import category_intervals, confidence_interval

_RECORD, _RELIANCE = TypeAdapter(Record), TypeAdapter(Reliance)
RELIANCE = "reliance.json"


class RunError(StormError, ValueError):
    """A run that cannot begin or be read; names the option, or file, line and field."""


@dataclass(frozen=True)
class Run:
    """Provenance and records, in the order of the files."""

    folder: Path
    provenance: dict[str, Any]
    records: tuple[Record, ...]
    reliance: Reliance | None = None  #: None: not measured

    @property
    def benchmark(self) -> str:
        return str(self.provenance["benchmark"])

    @property
    def control(self) -> str:
        """What was taken from the evidence; "" for nothing."""
        return self.provenance.get("control") or ""

    @property
    def system(self) -> str:
        """Reasoner and model, without their paths."""
        parts = (self.provenance.get("reasoner"), self.provenance.get("model"))
        return " · ".join(Path(str(part)).name for part in parts if part) or self.folder.name

    @property
    def videos(self) -> list[str]:
        return [record.video for record in self.records]


def read_run(folder: Path) -> Run:
    """Raises RunError for a torn or malformed line and for an id that comes twice, OSError for a missing file."""
    folder = Path(folder)
    file = folder / "run.json"
    try:
        provenance = json.loads(file.read_bytes())
    except ValueError as error:
        raise RunError(f"{file}: not JSON: {error}") from error
    if not isinstance(provenance, dict) or "benchmark" not in provenance:
        raise RunError(f"{file}: benchmark: missing")
    if not any(folder.glob("answers-*.jsonl")):
        raise AccessError(f"{folder} holds no answers-*.jsonl: run the evaluation first")
    return Run(folder, provenance, tuple(read_records(folder)), read_reliance(folder))


def read_reliance(folder: Path) -> Reliance | None:
    """A folder's latent reliance, None where it was not measured. Raises RunError for another kind of file."""
    file = folder / RELIANCE
    if not file.exists():
        return None
    try:
        return _RELIANCE.validate_json(file.read_bytes())
    except ValidationError as error:
        raise RunError(
            f"{file}: not what storm evaluate writes: remove it, and it is made again"
        ) from error


def read_records(folder: Path) -> list[Record]:
    """What a folder holds so far, in the order of the files. Raises RunError as `read_run` does."""
    records: dict[str, Record] = {}
    places: dict[str, str] = {}
    for shard in sorted(folder.glob("answers-*.jsonl")):
        for number, line in enumerate(shard.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            place = f"{shard}:{number}"
            record = _record(line, place)
            if record.id in records:
                raise RunError(f"{place}: id: {record.id!r} is at {places[record.id]}, too")
            records[record.id], places[record.id] = record, place
    return list(records.values())


def _record(line: bytes, place: str) -> Record:
    try:
        return _RECORD.validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"])) or "torn or malformed line"
        raise RunError(f"{place}: {field}: {fault['msg']}") from error


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these folders, at any depth. Raises FileNotFoundError for a folder without one."""
    runs: list[Run] = []
    for path in paths:
        found = sorted(file.parent for file in Path(path).rglob("run.json"))
        if not found:
            raise AccessError(f"{path} holds no run.json: name the folder of a run")
        runs += [read_run(folder) for folder in found]
    return runs


def summarize(run: Run) -> dict[str, Any]:
    """All that tables need of a run. Shares are over every record; an error or unparsed answer is wrong."""
    records = run.records
    if not records:
        raise RunError(f"{run.folder}: no answers yet")
    replies = [record.reply for record in records if record.reply]
    return {
        "benchmark": run.benchmark,
        "system": run.system,
        "control": run.control,
        "n_expected": run.provenance.get("n_expected", len(records)),
        "videos": len(set(run.videos)),
        **_shares(records),
        "interval": confidence_interval([r.correct for r in records], run.videos),
        "rules": {
            name: _scored([rule(r.reply.text, r) if r.reply else 0.0 for r in records])
            for name, rule in RULES.get(run.benchmark, {}).items()
        },
        "groups": {key: _group(run, key) for key in _keys(records)},
        "seconds": _seconds(run),
        "rounds": _mean([reply.rounds for reply in replies]),
        "tokens": _mean([reply.tokens for reply in replies]),
        "prompt_tokens": _mean([reply.prompt_tokens for reply in replies]),
        "visual_tokens": _mean([reply.visual_tokens for reply in replies]),
        "opened": _mean([reply.opened for reply in replies]),
        "slots_used": _mean([reply.slots_used for reply in replies]),
        "forced_end": _mean([reply.forced_end for reply in replies if reply.opened]),
    }


def _shares(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    return {
        "n": n,
        "accuracy": sum(r.correct for r in records) / n,
        "unparsed": sum(not r.parsed and r.error is None for r in records) / n,
        "errors": sum(r.error is not None for r in records) / n,
        "official": _scored([r.official for r in records]),
    }


def _scored(scores: Sequence[float | None]) -> dict[str, Any]:
    """Mean over those that the rule has a verdict on, and how many these are."""
    given = [score for score in scores if score is not None]
    return {"accuracy": _mean(given), "scored": len(given)}


def _mean(values: Sequence[float]) -> float | None:
    return mean(map(float, values)) if values else None


def _keys(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record.groups))


def _group(run: Run, key: str) -> dict[str, Any]:
    """Shares and intervals of each category of one key, and their plain mean (macro)."""
    labels = [record.groups.get(key, "(none)") for record in run.records]
    names = sorted(set(labels))
    members = np.array([[label == name for name in names] for label in labels])
    hits = [record.correct for record in run.records]
    low, high, macro = category_intervals(hits, members, run.videos)
    categories = {
        name: {
            **_shares([r for r, label in zip(run.records, labels, strict=True) if label == name]),
            "interval": (float(low[i]), float(high[i])),
        }
        for i, name in enumerate(names)
    }
    average = mean(category["accuracy"] for category in categories.values())
    return {"macro": average, "macro_interval": macro, "categories": categories}


def _seconds(run: Run) -> dict[str, Any]:
    """Mean wall time of an item by phase, over the items that were timed; the total with its interval."""
    timed = [r for r in run.records if r.reply and "total" in r.reply.seconds]
    if not timed:
        return {}
    spent = [r.reply.seconds for r in timed if r.reply]
    totals = [seconds["total"] for seconds in spent]
    phases = list(dict.fromkeys(phase for seconds in spent for phase in seconds))
    return {
        **{phase: mean(seconds.get(phase, 0.0) for seconds in spent) for phase in phases},
        "interval": confidence_interval(totals, [r.video for r in timed]),
        "timed": len(timed),
    }
