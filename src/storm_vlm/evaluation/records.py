"""What an evaluation keeps: one `Record` per example, which every table, interval and comparison is made from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reply:
    """What a reasoner said to one question, and what that took."""

    text: str  #: the final turn, raw
    transcript: tuple[
        str, ...
    ] = ()  #: earlier turns: a chain of thought, tool calls and their results
    tokens: int = 0  #: written, over all rounds, latent slots not counted
    rounds: int = 1  #: of generation
    frame_times: tuple[
        float, ...
    ] = ()  #: seconds in the file, of every frame shown, over all rounds
    prompt_tokens: int = 0  #: of the last round, visual ones included
    visual_tokens: int = 0
    slots_used: int = 0
    forced_end: bool = False  #: the budget, not the model, closed the latent segment
    opened: bool = False  #: there was a latent segment
    #: wall time by phase: decode (video), vision, prefill, latent, answer (all written tokens), tool, total
    seconds: dict[str, float] = field(default_factory=dict)


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
