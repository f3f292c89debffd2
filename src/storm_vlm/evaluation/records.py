"""What an evaluation keeps: one `Record` per example, which every table, interval and comparison is made from."""

from __future__ import annotations

from dataclasses import dataclass

from storm_vlm.inference.reply import Reply


@dataclass(frozen=True)
class Record:
    """One example of a run, as a line of its `answers-*.jsonl`."""

    id: str
    video: str  #: what intervals are clustered on
    groups: dict[str, str]  #: the benchmark's categories of this example: task, duration …
    answer: str
    options: tuple[str, ...]
    reply: Reply | None  #: None: not asked, see `error`
    correct: bool  #: by the strict scorer; unparsed is wrong
    parsed: bool
    official: float | None = (
        None  #: by the benchmark's own rule on the same text; None: needs a judge
    )
    error: str | None = None  #: a missing or broken video; counted, and wrong
