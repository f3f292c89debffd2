"""What a reasoner said to one question."""

from __future__ import annotations

from dataclasses import dataclass, field

from storm_vlm.inference.client import Fault


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
    fed: dict[str, str] = field(
        default_factory=dict
    )  #: texts by what slots were fed, `storm validate`
    fault: Fault = ""  #: why an endpoint's text may be no answer: cut off, filtered or empty
