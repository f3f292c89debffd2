"""Questions about a scene, with the oracle's answer and plan.

Perception asks about what the clip shows; reasoning asks about what comes after it. Answers are words, not
option letters, so that a guess is worth little.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

from storm_vlm.lab.world.simulator import (
    COLOURS,
    HEADINGS,
    SIZE,
    Ball,
    Cell,
    Difficulty,
    Scene,
    cell_name,
    sample_scene,
)

S = TypeVar("S")
NUMBERS = ("none", "one", "two", "three")


@dataclass(frozen=True)
class Question:
    """`steps` is how many hidden steps the answer depends on (0: perception); `ball` is who is asked about.

    `moment`: start and end of what a grounding question asks for, in seconds; `cell`: the cell asked about, if any.
    Neither is in the name of the clip.
    """

    family: str
    text: str
    answer: str
    steps: int = 0
    ball: int = 0
    moment: tuple[float, float] | None = field(default=None, repr=False)
    cell: Cell | None = field(default=None, repr=False)


def _the_ball(scene: Scene, ball: int) -> str:
    if len(scene.tracks) == 1:
        return "the ball"
    return f"the {scene.tracks[ball][scene.now].colour} ball"  # by its colour when the clip ends


def _told_apart(scene: Scene) -> bool:
    """Every ball has a colour of its own when the clip ends, and none is ever drawn over another."""
    shown = list(zip(*(track[: scene.shown_steps] for track in scene.tracks), strict=True))
    cells = all(len({ball.cell for ball in balls}) == len(balls) for balls in shown)
    return cells and len({ball.colour for ball in shown[-1]}) == len(scene.tracks)


# ------------------------------------------------------------------------------------------ perception
def _position(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str]:
    when, index = rng.choice((("now", scene.now), ("at the start", 0)))
    return f"Where is {_the_ball(scene, ball)} {when}?", cell_name(scene.tracks[ball][index].cell)


def _direction(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str]:
    return f"Which way is {_the_ball(scene, ball)} heading now?", scene.after(0, ball).heading


def _speed(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str]:
    speed = "slow" if scene.after(0, ball).period == 2 else "fast"
    return f"How fast is {_the_ball(scene, ball)}?", speed


def _order(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str] | None:
    path = list(dict.fromkeys(b.cell for b in scene.tracks[ball][: scene.shown_steps]))
    if len(path) < 2:
        return None
    names = [cell_name(path[i]) for i in sorted(rng.sample(range(len(path)), 2))]
    asked = " or ".join(rng.sample(names, 2))
    return f"Where was {_the_ball(scene, ball)} first, {asked}?", names[0]


def _count(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str]:
    return "How many balls are there?", NUMBERS[len(scene.tracks)]


def _change(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str] | None:
    colours = {b.colour for b in scene.tracks[ball][: scene.shown_steps]}
    return f"Did {_the_ball(scene, ball)} change colour?", "yes" if len(colours) > 1 else "no"


def _colour(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str] | None:
    if len(scene.tracks) != 1:
        return None
    when, index = rng.choice((("now", scene.now), ("at the start", 0)))
    return f"What colour is the ball {when}?", scene.tracks[0][index].colour


def _tile(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str] | None:
    uncovered = [(r, c) for r in range(SIZE) for c in range(SIZE) if (r, c) not in scene.cover]
    kinds: dict[str, list[tuple[int, int]]] = {}
    for cell in uncovered:
        name = scene.tiles[cell].name if cell in scene.tiles else "nothing"
        kinds.setdefault(name, []).append(cell)
    name = rng.choice(sorted(kinds))  # by name first: most cells are empty
    return f"What lies at {cell_name(rng.choice(kinds[name]))}?", name


# ------------------------------------------------------------------------------------------- reasoning
def _deflected(ball: Ball) -> bool:
    return ball.heading != ball.came and ball.hit != "wall"


def _where(scene: Scene, ball: int, n: int) -> tuple[str, str]:
    after = scene.after(n, ball)
    return f"Where will {_the_ball(scene, ball)} be after {n} more steps?", cell_name(after.cell)


def _heading(scene: Scene, ball: int, n: int) -> tuple[str, str]:
    text = f"Which way will {_the_ball(scene, ball)} be heading after {n} more steps?"
    return text, scene.after(n, ball).heading


def _paint(scene: Scene, ball: int, n: int) -> tuple[str, str] | None:
    seen = {scene.after(i, ball).colour for i in range(n + 1)}
    if len(seen) == 1:
        return None  # nothing happens: the colour shown would do
    text = f"What colour will {_the_ball(scene, ball)} be after {n} more steps?"
    return text, scene.after(n, ball).colour


def _first_hit(scene: Scene, ball: int, n: int) -> tuple[str, str] | None:
    hits = [scene.after(i, ball).hit for i in range(1, n + 1)]
    blocks = [hit for hit in hits if hit not in (None, "wall")]
    if not blocks or hits[-1] != blocks[0]:  # the n-th step is the first hit of a block
        return None
    return f"Which block will {_the_ball(scene, ball)} hit first?", str(blocks[0])


def _emerge(scene: Scene, ball: int, n: int) -> tuple[str, str] | None:
    under = [scene.after(i, ball).cell in scene.cover for i in range(n + 1)]
    if under[-1] or not under[-2] or any(under[i] and not under[i + 1] for i in range(n - 1)):
        return None  # the n-th step is the first one out again
    text = f"Where will {_the_ball(scene, ball)} come out from under the cover?"
    return text, cell_name(scene.after(n, ball).cell)


def _track(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str]:
    path = [
        f"{b.colour} {cell_name(b.cell)} {b.heading}"
        for b in scene.tracks[ball][: scene.shown_steps]
    ]
    return f"What did {_the_ball(scene, ball)} do?", " ".join(path)


def _board(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str] | None:
    cells = [(r, c) for r in range(SIZE) for c in range(SIZE)]
    return None if scene.cover else ("What lies where?", _listed(scene, cells))


def _cells(scene: Scene, rng: random.Random, ball: int) -> tuple[str, str] | None:
    cells = rng.sample([(r, c) for r in range(SIZE) for c in range(SIZE)], 8)
    return None if scene.cover else ("What lies where, in any order?", _listed(scene, cells))


def _listed(scene: Scene, cells: Sequence[tuple[int, int]]) -> str:
    lies = [scene.tiles[cell].name if cell in scene.tiles else "nothing" for cell in cells]
    return " ".join(f"{cell_name(cell)} {name}" for cell, name in zip(cells, lies, strict=True))


PERCEPTION_FAMILIES: dict[str, Callable[..., tuple[str, str] | None]] = {
    "position": _position,
    "direction": _direction,
    "speed": _speed,
    "order": _order,
    "count": _count,
    "change": _change,
    "colour": _colour,
    "tile": _tile,
    "track": _track,
    "board": _board,
    "cells": _cells,
}
REASONING_FAMILIES: dict[str, Callable[..., tuple[str, str] | None]] = {
    "where": _where,
    "heading": _heading,
    "paint": _paint,
    "first_hit": _first_hit,
    "emerge": _emerge,
}
REASONING_SHARE = {"where": 0.4, "heading": 0.2, "paint": 0.15, "first_hit": 0.15, "emerge": 0.1}


def ask_perception(scene: Scene, rng: random.Random, family: str) -> Question | None:
    """A question of `family` about what is shown, or None if this scene has none."""
    if not _told_apart(scene):
        return None
    ball = rng.randrange(len(scene.tracks))
    asked = PERCEPTION_FAMILIES[family](scene, rng, ball)
    return None if asked is None else Question(family, *asked, ball=ball)


def ask_reasoning(scene: Scene, family: str, n: int, ball: int) -> Question | None:
    """A question of `family` about step `n` of the unseen part, or None if this scene has none.

    The ball must meet two mirrors or blocks on its way (or the straight line would do), and must not be
    trapped: it sees at least three cells.
    """
    if not _told_apart(scene):
        return None
    path = [scene.after(i, ball) for i in range(n + 1)]
    if len({b.cell for b in path}) < 3 or sum(_deflected(b) for b in path[1:]) < 2:
        return None
    asked = REASONING_FAMILIES[family](scene, ball, n)
    return None if asked is None else Question(family, *asked, steps=n, ball=ball)


def ask_moment(scene: Scene, rng: random.Random, step_seconds: float) -> Question | None:
    """When a ball is in a cell that it enters once and leaves or stays in, or None if there is no such cell."""
    if not _told_apart(scene):
        return None
    ball = rng.randrange(len(scene.tracks))
    path = [b.cell for b in scene.tracks[ball][: scene.shown_steps]]
    stays = [(cell, len(list(steps))) for cell, steps in groupby(path)]
    once = [
        c for c, _ in stays if [cell for cell, _ in stays].count(c) == 1 and c not in scene.cover
    ]
    if len(stays) < 2 or not once:
        return None
    cell = rng.choice(once)
    first, count = path.index(cell), path.count(cell)
    start, end = first * step_seconds, (first + count) * step_seconds
    text = f"When is {_the_ball(scene, ball)} at {cell_name(cell)}? Answer with its start and end in seconds."
    return Question("when", text, f"{start} - {end}", ball=ball, moment=(start, end))


def answers(family: str) -> list[str]:
    """Every answer that a reasoning family can have; chance is one over their number."""
    cells = [cell_name((r, c)) for r in range(SIZE) for c in range(SIZE)]
    return {
        "where": cells,
        "emerge": cells,
        "heading": list(HEADINGS),
        "paint": list(COLOURS),
        "first_hit": [f"{colour} block" for colour in COLOURS],
        "lies": [f"{colour} {kind}" for colour in COLOURS for kind in ("block", "pad")]
        + ["nothing"],
    }[family]


def sample_reasoning(
    rng: random.Random, difficulty: Difficulty, count: int, horizon: tuple[int, int]
) -> Iterator[tuple[Scene, Question]]:
    """`count` reasoning questions, each on a scene of its own, with answers balanced within each family."""

    def ask(scene: Scene, family: str) -> list[Question]:
        return [
            question
            for ball in range(len(scene.tracks))
            for n in range(horizon[0], horizon[1] + 1)
            if (question := ask_reasoning(scene, family, n, ball)) is not None
        ]

    return balanced(rng, count, REASONING_SHARE, lambda: sample_scene(rng, difficulty), ask)


def balanced(
    rng: random.Random,
    count: int,
    shares: Mapping[str, float],
    sample: Callable[[], S],
    ask: Callable[[S, str], Sequence[Question]],
) -> Iterator[tuple[S, Question]]:
    """`count` scenes of `sample`, each with one question of those that `ask` has; families by their `shares`.

    Answers are balanced within each family.
    """
    wanted = {family: round(share * count) for family, share in shares.items()}
    wanted["where"] += count - sum(wanted.values())
    asked: Counter[tuple[str, str]] = Counter()
    while sum(wanted.values()):
        scene = sample()
        family = rng.choice([f for f, left in wanted.items() if left])
        options = ask(scene, family)
        if not options:
            continue
        question = rng.choice(options)
        # Keep a question only if its answer is not ahead of the rarest one by more than a little.
        counts = [asked[family, answer] for answer in answers(family)]
        if asked[family, question.answer] > min(counts) + max(2, count // 200):
            continue
        asked[family, question.answer] += 1
        wanted[family] -= 1
        yield scene, question


def plan(scene: Scene, question: Question) -> str:
    """The oracle's plan: one clause for each hidden step, as a teacher would write it (paper sec. 3.2)."""

    def clause(ball: Ball) -> str:
        if ball.hit is not None:
            return f"hits the {ball.hit} at {cell_name(ball.cell)} and turns {ball.heading}"
        turn = f" and turns {ball.heading}" if ball.heading != ball.came else ""
        return f"rolls to {cell_name(ball.cell)}{turn}"

    start = scene.after(0, question.ball)
    steps = [scene.after(i, question.ball) for i in range(1, question.steps + 1)]
    path = "; ".join(f"step {i}: it {clause(ball)}" for i, ball in enumerate(steps, 1))
    return (
        f"The {start.colour} ball is at {cell_name(start.cell)}, heading {start.heading}. "
        f"{path}. The answer is {question.answer}."
    )
