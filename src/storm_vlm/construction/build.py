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
from storm_vlm.data.atomic_write import in_one_step, write_json
from storm_vlm.data.check import RowFile, check_text, row_faults, tell_faults
from storm_vlm.data.output import check_outputs, exclusive
from storm_vlm.data.prompt import PromptError
from storm_vlm.data.row import Row, portable, row_line
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.thread_pool import completed, proceed, thread_pool
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
        videos = sum(1 for _ in self.store.files("thoughts", ".mp4"))
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


def load_rows(source: str | Path, config: BuildConfig, shard: Shard | None = None) -> RowFile:
    """Raises StormError for rows of a split that must not be built from, before anybody is paid."""
    refused: list[str] = []

    def mine(row: Row) -> bool:
        if row.split not in config.splits:
            refused.append(f"{row.id!r}, {row.split}")
        return shard is None or shard.holds(row)

    rows = RowFile(source, mine)
    if refused:
        raise StormError(
            f"{source}: {len(refused)} rows are of another split than {'/'.join(config.splits)} (the first: "
            f"{refused[0]}); the teacher is told answers, so leave them out"
        )
    return rows


Work = Callable[[Builder, RowFile], Counter[str]]


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
    rows, out = load_rows(source, config, shard), Path(out)
    with exclusive(out, f"{shard.number}of{shard.count}" if shard else ""):
        _check_outputs(out, source)
        faults = {**rows.malformed, **row_faults(rows)}
        tell_faults(faults, len(rows) + len(rows.malformed), source, config.max_errors)
        builder = Builder(config, store or out / "store")
        began = builder.spent()
        states = (work or in_threads)(builder, rows)
        account = _account(states, began, builder.spent())
        if shard is None:
            return _collect(builder, rows, out, account)
        summary = {"rows": len(rows), **account}
        write_json(out / f"summary-{shard.number}of{shard.count}.json", summary)
        return summary


def _check_outputs(out: Path, source: str | Path) -> None:
    check_outputs(
        [out / name for name in ("rows.jsonl", "rejects.jsonl", "summary.json")], [source]
    )


def in_threads(builder: Builder, rows: RowFile) -> Counter[str]:
    """`workers` rows at a time: one waits for the teacher while another is decoded or imagined."""
    with thread_pool(builder.config.workers) as pool:
        outcomes = completed(pool, builder.build, rows)
        return Counter(state for _, state in tqdm(outcomes, "rows", len(rows), leave=False))


def collect(
    source: str | Path, out: str | Path, config: BuildConfig, store: str | Path | None = None
) -> dict[str, Any]:
    """Write what the store holds of `source`'s rows; returns the summary. Asks and generates nothing."""
    rows, out = load_rows(source, config), Path(out)
    with exclusive(out):
        _check_outputs(out, source)
        builder = Builder(config, store or out / "store")
        if len(rows) and not any(builder.finished(row) for row in rows):
            raise StormError(
                f"{builder.store.folder} holds no finished row of {source}, as these settings would make them: run "
                "storm build with the same source, settings and store first"
            )
        return _collect(builder, rows, out, {})


def _collect(builder: Builder, rows: RowFile, out: Path, account: dict[str, Any]) -> dict[str, Any]:
    out, sieve = out.absolute(), Sieve(builder.config.filters)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    first_unfinished = None
    with (
        in_one_step(out / "rows.jsonl") as kept_path,
        in_one_step(out / "rejects.jsonl") as rejects_path,
        kept_path.open("w", encoding="utf-8") as kept,
        rejects_path.open("w", encoding="utf-8") as rejects,
    ):

        def reject(**why: Any) -> None:
            reasons[why["reason"]] += 1
            rejects.write(json.dumps(why, ensure_ascii=False) + "\n")

        for row in tqdm(rows, "rows collected", len(rows), leave=False):
            if (draft := builder.finished(row)) is None:
                counts["unfinished"] += 1
                first_unfinished = first_unfinished or row.id
                continue
            counts["asked_again"] += not draft.final
            made, why = sieve.judge(draft)
            if why is None:
                kept.write(row_line(made, out))
                counts["kept"] += 1
                counts["own"] += builder.resources.keeps_thought_video(row)
            else:
                reject(**why, row=portable(made, out).model_dump())
        for place, fault in rows.malformed.items():
            reject(id=place, reason="malformed", detail=fault)
    summary = {
        "rows": len(rows) + len(rows.malformed),
        "kept": counts["kept"],
        "own_thought_videos": counts["own"],
        "rejected": dict(reasons),
        "unfinished": counts["unfinished"],
        "asked_again": counts["asked_again"],
        "first_unfinished": first_unfinished,
        **account,
        "config": builder.config.model_dump(mode="json"),
        "source": builder.store.content(rows.file),
        "versions": versions(),
        "commit": commit(),
    }
    write_json(out / "summary.json", summary)
    return summary


class Sieve:
    """The thresholds, draft by draft. Of near-duplicates the first is kept."""

    def __init__(self, thresholds: FilterConfig) -> None:
        self._limits = thresholds.model_dump()
        self._earlier = Duplicates(thresholds.duplicate or 0.0)

    def judge(self, draft: Draft) -> tuple[Row, dict[str, Any] | None]:
        """The row, with scores in its provenance, and why it is rejected, if it is."""
        scores, clip = dict(draft.scores), (draft.row.video, draft.row.start, draft.row.end)
        printed = bool(draft.fingerprint) and self._limits["duplicate"] is not None
        if printed:
            scores["duplicate"] = round(self._earlier.nearest(draft.fingerprint, clip), 6)
        reason, score = draft.rejected, None
        for name, value in scores.items() if reason is None else ():
            limit = self._limits[name]
            if limit is not None and (value < limit if name in LOW_IS_BAD else value > limit):
                reason, score = name, value
                break
        if reason is not None:
            told = {"id": draft.row.id, "reason": reason, "score": score, "detail": draft.detail}
            return draft.row, {**told, "threshold": self._limits.get(reason), "scores": scores}
        if printed:
            self._earlier.add(draft.fingerprint, clip)
        return _with_scores(draft.row, scores), None


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
