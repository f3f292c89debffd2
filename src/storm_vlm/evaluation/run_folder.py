"""A run on disk: `run.json` says how it was made, `answers-*.jsonl` hold its records, `reliance.json` (of STORM only)
says what its answers owe to the latents."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from storm_vlm.errors import AccessError, StormError
from storm_vlm.evaluation.judge import Judged, read_judged
from storm_vlm.evaluation.records import Record, Reliance

_RECORD, _RELIANCE = TypeAdapter(Record), TypeAdapter(Reliance)
RELIANCE = "reliance.json"
log = logging.getLogger(__name__)
#: Of an endpoint's answers (`Reply.fault`), and what to do about it.
FAULTS = {
    "cut_off": "they ended at the bound on tokens, which a reasoning model may spend on thinking: raise "
    "--max-new-tokens",
    "empty": "no text came: raise --max-new-tokens for a model that thinks first, or mend its server's reasoning "
    "parser, which may have taken the answer for a thought",
    "filtered": "the endpoint's content filter held them back",
}


class RunError(StormError, ValueError):
    """A run that cannot begin or be read; names the option, or file, line and field."""


@dataclass(frozen=True)
class Run:
    """Provenance and records, in the order of the files."""

    folder: Path
    provenance: dict[str, Any]
    records: tuple[Record, ...]
    reliance: Reliance | None = None  #: None: not measured
    judged: Judged | None = None  #: None: no judge was asked

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
    provenance = read_provenance(folder)
    if not any(folder.glob("answers-*.jsonl")):
        raise AccessError(f"{folder} holds no answers-*.jsonl: run the evaluation first")
    return Run(
        folder, provenance, tuple(read_records(folder)), read_reliance(folder), read_judged(folder)
    )


def read_provenance(folder: Path) -> dict[str, Any]:
    """A folder's `run.json`. Raises RunError for a torn or malformed one, OSError for a missing one."""
    file = folder / "run.json"
    try:
        provenance = json.loads(file.read_bytes())
    except ValueError as error:
        raise RunError(f"{file}: not JSON: {error}") from error
    if not isinstance(provenance, dict) or "benchmark" not in provenance:
        raise RunError(f"{file}: benchmark: missing")
    return provenance


def read_reliance(folder: Path, about: Mapping[str, Any] | None = None) -> Reliance | None:
    """A folder's latent reliance, None where it was not measured. Raises RunError for another kind of file.

    `about`: what it was measured on; None for another's, too.
    """
    file = folder / RELIANCE
    if not file.exists():
        return None
    try:
        reliance, made = _RELIANCE.validate_json(file.read_bytes()), json.loads(file.read_bytes())
    except ValidationError as error:
        raise RunError(
            f"{file}: not what storm evaluate writes: remove it, and it is made again"
        ) from error
    return None if about and any(made.get(key) != about[key] for key in about) else reliance


def read_records(folder: Path) -> list[Record]:
    """What a folder holds so far, in the order of the files. Raises RunError as `read_run` does."""
    records: dict[str, Record] = {}
    places: dict[str, str] = {}
    for shard in sorted(folder.glob("answers-*.jsonl")):
        for number, line in enumerate(shard.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            place = f"{shard}:{number}"
            record = read_record(line, place)
            if record.id in records:
                raise RunError(f"{place}: id: {record.id!r} is at {places[record.id]}, too")
            records[record.id], places[record.id] = record, place
    return list(records.values())


def read_record(line: bytes, place: str) -> Record:
    """A line of an answers file. Raises RunError, which names `place`."""
    try:
        return _RECORD.validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"])) or "torn or malformed line"
        raise RunError(
            f"{place}: {field}: {fault['msg']}; without the line, its row is asked again"
        ) from error


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these folders, at any depth; those without an answer are left out, and named.

    Raises FileNotFoundError for a folder without one that has answers.
    """
    runs: list[Run] = []
    for path in paths:
        folders = sorted(file.parent for file in Path(path).rglob("run.json"))
        if not folders:
            raise AccessError(f"{path} holds no run.json: name the folder of a run")
        answered = [f for f in folders if any(a.stat().st_size for a in f.glob("answers-*.jsonl"))]
        if not answered:
            raise RunError(f"{folders[0]} holds no answers yet: evaluate with this --out again")
        for folder in sorted(set(folders) - set(answered)):
            log.warning("%s holds no answers yet: left out", folder)
        runs += [read_run(folder) for folder in answered]
    return runs
