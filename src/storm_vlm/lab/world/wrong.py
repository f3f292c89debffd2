"""Thought videos that are wrong on purpose, as those of a generator that errs (the paper's first limitation)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

from storm_vlm.lab.world.questions import Question
from storm_vlm.lab.world.simulator import Scene, opposite, simulate

Fault = Literal["turn", "step", "scene"]
Asked = tuple[Scene, Question]
FAULTS: tuple[Fault, ...] = ("turn", "step", "scene")


def fault_of(row_id: str, share: float) -> Fault | None:
    """What is to be wrong with a row's thought video; None for all but `share` of the rows.

    The rows of a share are among those of every larger one, and have the same faults there.
    """
    rng = random.Random(f"wrong/{row_id}")
    drawn, fault = rng.random(), rng.choice(FAULTS)
    return fault if drawn < share else None


def spoiled(scene: Scene, question: Question, fault: Fault, other: Asked, row_id: str) -> Asked:
    """What a wrong thought video shows.

    `turn`: at one of its turns the ball takes the opposite heading, and goes on from there by the rules. `step`: one
    of the hidden steps is left out. `scene`: it is that of `other`.
    """
    if fault == "scene":
        return other
    rng, track, first = random.Random(row_id), scene.tracks[question.ball], scene.now + 1
    hidden = range(first, first + question.steps)
    if fault == "step":
        gone = rng.choice(hidden)
        track = track[:gone] + track[gone + 1 :]
        question = replace(question, steps=question.steps - 1)
    else:
        turn = rng.choice([i for i in hidden if track[i].heading != track[i].came])
        astray = replace(track[turn], heading=opposite(track[turn].heading))
        track = track[:turn] + simulate(scene.tiles, astray, len(track) - turn)
    tracks = list(scene.tracks)
    tracks[question.ball] = track
    return replace(scene, tracks=tuple(tracks)), question
