"""From rows to training rows: every row through the steps, and what came of it into three files.

`rows.jsonl`, `rejects.jsonl` (with reason and score) and `summary.json`. Nothing is lost and nothing is done twice:
see `data/store.py` and `teacher.py`. The files are a function of the source and the config alone, whatever happened
on the way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from storm_vlm.construction import filters
from storm_vlm.construction.config import BuildConfig, FilterConfig
from storm_vlm.construction.filters import LOW_IS_BAD, Duplicates
from storm_vlm.construction.steps import STEP_FUNCTIONS, Draft, Resources
from storm_vlm.construction.teacher import BudgetReached
from storm_vlm.construction.types import Rejected
from storm_vlm.data.atomic_write import write_json, write_text
from storm_vlm.data.check import check_text, fault_lines, row_faults, tell_faults
from storm_vlm.data.output import check_outputs, exclusive
from storm_vlm.data.prompt import PromptError
from storm_vlm.data.row import Row, RowError, portable, scan_rows, write_rows
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.thread_pool import proceed, thread_pool
from storm_vlm.data.video import VideoError
from storm_vlm.errors import StormError
from storm_vlm.inference.client import UnansweredError
from storm_vlm.versions import commit, versions

log = logging.getLogger(__name__)
State = Literal["done", "unanswered", "budget"]


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count`. Which rows belong to it depends on their ids alone."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        number, _, count = text.partition("/")
        if number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count):
            return cls(int(number), int(count))
        raise StormError(f"a shard is i/n with i from 1 to n, got {text!r}")

    def holds(self, row: Row) -> bool:
        digest = hashlib.sha256(row.id.encode()).digest()
        return int.from_bytes(digest[:8]) % self.count == self.number - 1


class Builder:
    """Takes single rows through the steps. Safe to use from many threads; one per process."""

    def __init__(self, config: BuildConfig, store: str | Path) -> None:
        self.config = config
        self.store = Store(store, durable=True)
        self.resources = Resources(config, self.store)

    def key(self, row: Row) -> str:
        """The key of the row's result: its fields, its files by content, and what of the config decides."""
        fields = row.model_dump(mode="json", exclude={"video": True, "thought_video": {"path"}})
        thought = row.thought_video
        content = self.store.content
        files = [content(row.video), content(thought.path) if thought else ""]
        rules = filters.RULES
        return key_of(row=fields, files=files, config=self.config.determining(), rules=rules)

    def finished(self, row: Row) -> Draft | None:
        """The row's result, if it is there."""
        try:
            check_text(row)
            key = self.key(row)
        except PromptError as error:
            return Draft(row=row, rejected="text", detail=str(error))
        except OSError as error:
            return Draft(row=row, rejected="video", detail=str(error))
        draft = self.store.read("rows", key, lambda p: Draft.model_validate_json(p.read_bytes()))
        return None if draft is None else self._placed(draft, row)

    def advance(self, draft: Draft, steps: Iterable[str]) -> Draft:
        """Through some steps. Raises `UnansweredError` or `BudgetReached` if the teacher cannot be asked."""
        for step in steps:
            proceed()
            if draft.rejected is None:
                try:
                    draft = STEP_FUNCTIONS[step](self.resources, draft)  # type: ignore[index]
                except Rejected as reject:
                    fate = {"rejected": reject.reason, "detail": reject.detail}
                    fate |= {"final": draft.final and reject.final}
                    draft = draft.model_copy(update=fate)
                except VideoError as error:
                    draft = draft.model_copy(update={"rejected": "video", "detail": str(error)})
        return draft

    def finish(self, row: Row, draft: Draft) -> None:
        """Store the result of the source's `row`."""
        self.store.write("rows", self.key(row), draft.model_dump_json().encode())

    def spent(self) -> dict[str, Any]:
        """Time, and what the store holds of what costs."""
        teacher = self.resources.teacher
        videos = len(self.store.files("thoughts", ".mp4"))
        totals = {"teacher": teacher.spent.totals(teacher.config)} if teacher else {}
        return {"time": time.perf_counter(), "thought_videos": videos, **totals}

    def build(self, row: Row) -> State:
        """All steps of one row."""
        if (draft := self.finished(row)) and draft.final:
            return "done"
        try:
            self.finish(row, self.advance(Draft(row=row), self.config.steps))
        except UnansweredError as error:
            log.warning("%s is left for the next run: %s", row.id, error)
            return "unanswered"
        except BudgetReached:
            return "budget"
        return "done"

    def _placed(self, draft: Draft, row: Row) -> Draft:
        """With paths as they are now: the store, and the videos, may have been moved since."""
        thought = draft.row.thought_video
        if thought is not None and (key := thought.provenance.get("key")):
            path = self.store.path("thoughts", key, ".mp4")
            if path.exists():
                thought = thought.model_copy(update={"path": str(path)})
        placed = draft.row.model_copy(update={"video": row.video, "thought_video": thought})
        return draft.model_copy(update={"row": placed})


def load_rows(source: str | Path, config: BuildConfig) -> tuple[list[Row], dict[str, str]]:
    """As `scan_rows`. Raises StormError for rows of a split that must not be built from, before anybody is paid."""
    rows, malformed = scan_rows(source)
    if malformed and not rows:
        raise RowError(f"{source} holds no row:\n{fault_lines(malformed, source)}")
    refused = [row for row in rows if row.split not in config.splits]
    if refused:
        raise StormError(
            f"{source}: {len(refused)} rows are of another split than {'/'.join(config.splits)} (the first: "
            f"{refused[0].id!r}, {refused[0].split}); the teacher is told answers, so leave them out"
        )
    return rows, malformed


Work = Callable[[Builder, list[Row]], Counter[str]]


def run(
    source: str | Path,
    out: str | Path,
    config: BuildConfig,
    shard: Shard | None = None,
    store: str | Path | None = None,
    work: Work | None = None,
) -> dict[str, Any]:
    """Build all rows of `source`, or those of a shard, and return the summary.

    A shard writes `summary-IofN.json` only; `collect` writes the rows once all shards are through.

    Args:
        store: where finished work is kept, by default `out/store`; many runs may share one.
        work: how rows are worked off; by default in threads of this process (see also `ray_build.py`).

    Raises:
        StormError: rows of a test split, a missing key or package, an endpoint that refuses; an `out` that another
            process is at work on, or that would overwrite `source`.
    """
    (rows, malformed), out = load_rows(source, config), Path(out)
    with exclusive(out, f"{shard.number}of{shard.count}-" if shard else ""):
        _check_outputs(out, source)
        faults = {**malformed, **row_faults(rows)}
        tell_faults(faults, len(rows) + len(malformed), source, config.max_errors)
        return _run(source, out, config, shard, store, work, rows)


def _check_outputs(out: Path, source: str | Path) -> None:
    check_outputs(
        [out / name for name in ("rows.jsonl", "rejects.jsonl", "summary.json")], [source]
    )


def _run(
    source: str | Path,
    out: Path,
    config: BuildConfig,
    shard: Shard | None,
    store: str | Path | None,
    work: Work | None,
    rows: list[Row],
) -> dict[str, Any]:
    builder = Builder(config, store or out / "store")
    began = builder.spent()
    mine = [row for row in rows if shard is None or shard.holds(row)]
    states = (work or in_threads)(builder, mine)
    account = _account(states, began, builder.spent())
    if shard is None:
        return collect(source, out, config, store, account)
    summary = {"rows": len(mine), **account}
    write_json(out / f"summary-{shard.number}of{shard.count}.json", summary)
    return summary


def in_threads(builder: Builder, rows: list[Row]) -> Counter[str]:
    """`workers` rows at a time: one waits for the teacher while another is decoded or imagined."""
    states: Counter[str] = Counter()
    with thread_pool(builder.config.workers) as pool:
        futures = [pool.submit(builder.build, row) for row in rows]
        for future in tqdm(as_completed(futures), "rows", len(rows), leave=False):
            states[future.result()] += 1
    return states


def collect(
    source: str | Path,
    out: str | Path,
    config: BuildConfig,
    store: str | Path | None = None,
    account: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what the store holds of `source`'s rows; returns the summary. Asks and generates nothing."""
    out = Path(out).absolute()
    _check_outputs(out, source)
    builder = Builder(config, store or out / "store")
    rows, malformed = load_rows(source, config)
    drafts = [(row.id, builder.finished(row)) for row in rows]
    done = [draft for _, draft in drafts if draft is not None]
    if account is None and rows and not done:
        raise StormError(
            f"{builder.store.folder} holds no finished row of {source}, as these settings would make them: run storm "
            "build with the same source, settings and store first"
        )
    kept, rejects = apply_filters(done, config.filters)
    write_rows(out / "rows.jsonl", kept)
    told = [{**r, "row": portable(r["row"], out).model_dump()} for r in rejects]
    told += [{"id": p, "reason": "malformed", "detail": why} for p, why in malformed.items()]
    lines = (json.dumps(reject, ensure_ascii=False) + "\n" for reject in told)
    write_text(out / "rejects.jsonl", "".join(lines))
    summary = {
        "rows": len(drafts) + len(malformed),
        "kept": len(kept),
        "rejected": dict(Counter(str(reject["reason"]) for reject in told)),
        "unfinished": len(drafts) - len(done),
        "asked_again": sum(not draft.final for draft in done),
        "first_unfinished": next((id for id, draft in drafts if draft is None), None),
        **(account or {}),
        "config": config.model_dump(mode="json"),
        "source": builder.store.content(source),
        "versions": versions(),
        "commit": commit(),
    }
    write_json(out / "summary.json", summary)
    return summary


def apply_filters(
    drafts: list[Draft], thresholds: FilterConfig
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Kept rows, with scores in their provenance, and rejects, both in the drafts' order.

    Of near-duplicates the first is kept.
    """
    kept: list[Row] = []
    rejects: list[dict[str, Any]] = []
    earlier = Duplicates(thresholds.duplicate or 0.0)
    limits = thresholds.model_dump()
    for draft in drafts:
        scores, clip = dict(draft.scores), (draft.row.video, draft.row.start, draft.row.end)
        if draft.fingerprint and thresholds.duplicate is not None:
            scores["duplicate"] = round(earlier.nearest(draft.fingerprint, clip), 6)
        reason, score = draft.rejected, None
        for name, value in scores.items() if reason is None else ():
            limit = limits[name]
            if limit is not None and (value < limit if name in LOW_IS_BAD else value > limit):
                reason, score = name, value
                break
        if reason is not None:
            told = {"id": draft.row.id, "reason": reason, "score": score, "detail": draft.detail}
            told |= {"threshold": limits.get(reason), "scores": scores}
            rejects.append({**told, "row": draft.row})
            continue
        if draft.fingerprint and thresholds.duplicate is not None:
            earlier.add(draft.fingerprint, clip)
        kept.append(_with_scores(draft.row, scores))
    return kept, rejects


def _with_scores(row: Row, scores: dict[str, float]) -> Row:
    thought = row.thought_video
    if thought is None or not scores:
        return row
    provenance = {**thought.provenance, "scores": scores}
    return row.model_copy(
        update={"thought_video": thought.model_copy(update={"provenance": provenance})}
    )


def _account(states: Counter[str], began: dict[str, Any], ended: dict[str, Any]) -> dict[str, Any]:
    """What the run took. `stopped` says why rows are unfinished, if some are."""
    made = ended["thought_videos"] - began["thought_videos"]
    account = {
        "stopped": next((why for why in ("budget", "unanswered") if states[why]), None),
        "states": dict(states),
        "seconds": round(ended["time"] - began["time"], 3),
        "thought_videos_made": made,
    }
    if "teacher" in ended:
        calls = ended["teacher"]["calls"] - began["teacher"]["calls"]
        account["teacher"] = {"calls_made": calls, "in_store": ended["teacher"]}
    return account
