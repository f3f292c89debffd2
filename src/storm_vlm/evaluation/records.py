"""What an evaluation keeps: a `Record` of each example, and what a STORM's answers owe to its latents."""

from __future__ import annotations

from dataclasses import dataclass, field

from storm_vlm.evaluation.statistics import Estimate
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
    error: str | None = None  #: why it could not be asked; counted, and wrong
    clip: str | None = None  #: which file the video was, see `clip_identity`
    shares: dict[str, float] = field(default_factory=dict)  #: see `answer_shares`


@dataclass(frozen=True)
class Intervention:
    """What became of the answers when the slots were fed something; over rows that have it, None: none has."""

    what: str
    accuracy: Estimate | None
    difference: Estimate | None  #: from the accuracy with their own latents, on the same rows
    changed: Estimate | None  #: not what is answered with the own latents
    follows: Estimate | None = None  #: of swaps: the answer became the donor's
    follows_own: Estimate | None = (
        None  #: and is the donor's with the own latents, too: by accident
    )
    follows_more: Estimate | None = None  #: the difference of these two, on the same rows


@dataclass(frozen=True)
class Movement(Estimate):
    """How far latents move, relative to how far those of different clips lie apart; in all and by slot."""

    slots: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """How far latents move when a row's clip, or its question, is exchanged for another's."""

    clip: Movement
    question: Movement


@dataclass(frozen=True)
class Reliance:
    """Whether answers depend on the latents. Intervals are over videos."""

    n: int
    drawn_from: int  #: rows that there were
    videos: int
    slots: int
    interventions: dict[str, Intervention]
    reliance: Estimate  #: what another clip's latents of another answer cost, as a share of rows
    sensitivity: Sensitivity


@dataclass(frozen=True)
class Probes:
    """Linear probes for the answer at slots and at text of the prompt, by decoder layer; trained on other clips.

    Estimates are shares of rows and layers for which the probe of all slots, or of all text, names the answer.
    Intervals are over videos.
    """

    layers: tuple[int, ...]
    accuracy: dict[str, list[float]]  #: by position, a share for each layer
    slots: Estimate
    text: Estimate
    shuffled: Estimate  #: of the slots, with answers shuffled between clips
    over_text: Estimate  #: slots less text, on the same rows
    over_shuffled: Estimate
    decodability: Estimate | None  #: correlation with right answers, over rows, of the slots' share
    cosine: (
        Estimate | None
    )  #: and of the latents' cosine to their targets; None: no targets, or nothing varies
