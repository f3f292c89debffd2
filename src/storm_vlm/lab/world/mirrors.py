"""The first world, of balls and mirrors: which scenes there are, and what is asked about each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from storm_vlm.data.row import Split
from storm_vlm.errors import InputError
from storm_vlm.lab.world.questions import (
    PERCEPTION_FAMILIES,
    REASONING_FAMILIES,
    Question,
    ask_moment,
    ask_perception,
    ask_reasoning,
    sample_reasoning,
)
from storm_vlm.lab.world.render import FPS, FRAMES_PER_STEP
from storm_vlm.lab.world.simulator import (
    OUT_OF_DISTRIBUTION,
    PERCEPTION,
    REASONING,
    Difficulty,
    Scene,
    cell_name,
    sample_scene,
    simulate,
)

NUM_FRAMES = REASONING.shown_steps * FRAMES_PER_STEP  # what a model must be shown to see it all
HORIZON = (3, 5)  # hidden steps that a question is about
FAR_HORIZON = (6, 7)
ANY_HORIZON = (3, 7)
ASKED = (*PERCEPTION_FAMILIES, "tile", "tile", "position")  # these three need the most practice


def draw_scenes(
    kind: str,
    split: Split,
    count: int,
    seed: int,
    questions: int = 1,
    near: tuple[int, int] = HORIZON,
    near_difficulty: Difficulty = REASONING,
) -> Iterator[tuple[Scene, list[Question]]]:
    """The scenes of `build_world`, with their questions; the same arguments give the same scenes.

    `near`: fewest and most hidden steps, but in the split `ood`; of scenes of `near_difficulty`.
    """
    rng = random.Random(f"{kind}/{split}/{seed}")
    if kind != "reasoning":
        yield from (sample_perception if kind == "perception" else sample_grounding)(rng, count)
        return
    far = split == "ood"
    difficulty, horizon = (OUT_OF_DISTRIBUTION, FAR_HORIZON) if far else (near_difficulty, near)
    if questions > 1:
        yield from sample_several(rng, difficulty, count, horizon, questions)
        return
    for scene, question in sample_reasoning(rng, difficulty, count, horizon):
        yield scene, [question]


def prolonged(scene: Scene, steps: int) -> Scene:
    """The scene with that many of its unseen steps shown."""
    shown = scene.shown_steps + steps
    tracks = tuple(simulate(scene.tiles, track[0], shown) for track in scene.tracks)
    return replace(scene, tracks=tracks, shown_steps=shown)


def sample_perception(rng: random.Random, count: int) -> Iterable[tuple[Scene, list[Question]]]:
    """`count` scenes, each with questions of every family that fits it; most scenes have one ball."""
    for number in range(count):
        questions: list[Question] = []
        while not questions:
            scene = sample_scene(rng, rng.choice((REASONING, REASONING, REASONING, PERCEPTION)))
            asking = random.Random(number)
            asked = [ask_perception(scene, asking, family) for family in ASKED]
            questions = [question for question in dict.fromkeys(asked) if question is not None]
        yield scene, questions


def sample_grounding(rng: random.Random, count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """`count` scenes, each with a moment to be found ("when") and an open question, what the ball does ("track")."""
    while count:
        scene = sample_scene(rng, REASONING)
        asked = [ask_moment(scene, rng, FRAMES_PER_STEP / FPS), ask_perception(scene, rng, "track")]
        questions = [question for question in asked if question is not None]
        if len(questions) == len(asked):
            count -= 1
            yield scene, questions


def sample_several(
    rng: random.Random, difficulty: Difficulty, count: int, horizon: tuple[int, int], questions: int
) -> Iterable[tuple[Scene, list[Question]]]:
    """`count` scenes, each with that many reasoning questions, no two of one family; answers are not balanced.

    Raises ValueError for more questions than there are families.
    """
    if questions > len(REASONING_FAMILIES):
        raise InputError(f"at most {len(REASONING_FAMILIES)} questions a scene, got {questions}")
    while count:
        scene, asked = sample_scene(rng, difficulty), []
        for family in rng.sample(sorted(REASONING_FAMILIES), len(REASONING_FAMILIES)):
            hidden = range(horizon[0], horizon[1] + 1)
            possible = [
                question
                for ball in range(len(scene.tracks))
                for n in hidden
                if (question := ask_reasoning(scene, family, n, ball)) is not None
            ]
            asked += [rng.choice(possible)] if possible else []
        if len(asked) >= questions:
            count -= 1
            yield scene, asked[:questions]


def shortcuts(scene: Scene, question: Question) -> dict[str, str]:
    """What two ways to answer without simulating would say.

    `last_seen`: what holds when the clip ends still holds. `straight_line`: the ball rolls on between the walls
    and over pads, as if there were no mirrors and no blocks.
    """
    pads = {cell: tile for cell, tile in scene.tiles.items() if tile.kind == "pad"}
    now = scene.after(0, question.ball)
    straight = simulate(pads, now, question.steps + 1)
    blocks = sorted(tile.name for tile in scene.tiles.values() if tile.kind == "block")
    without_mirrors = {c: tile for c, tile in scene.tiles.items() if tile.kind == "block"}
    hits = [ball.hit for ball in simulate(without_mirrors, now, 8) if ball.hit in blocks]
    out = next(
        (
            b
            for a, b in itertools.pairwise(straight)
            if a.cell in scene.cover and b.cell not in scene.cover
        ),
        straight[-1],
    )
    return {
        "where": {"last_seen": cell_name(now.cell), "straight_line": cell_name(straight[-1].cell)},
        "emerge": {"last_seen": cell_name(now.cell), "straight_line": cell_name(out.cell)},
        "heading": {"last_seen": now.heading, "straight_line": straight[-1].heading},
        "paint": {"last_seen": now.colour, "straight_line": straight[-1].colour},
        "first_hit": {
            "last_seen": blocks[0] if blocks else "",
            "straight_line": str((hits or blocks)[0]),
        },
    }[question.family]
