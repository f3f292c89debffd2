"""Write the micro world to disk: MP4 clips, thought videos and rows."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from storm_vlm.data.output import exclusive
from storm_vlm.data.row import Row, Split, ThoughtVideo, write_rows
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.data.video import write_video
from storm_vlm.errors import InputError
from storm_vlm.lab.world.questions import (
    PERCEPTION_FAMILIES,
    REASONING_FAMILIES,
    Question,
    ask_moment,
    ask_perception,
    ask_reasoning,
    plan,
    sample_reasoning,
)
from storm_vlm.lab.world.render import FPS, FRAMES_PER_STEP, clip_frames, thought_frames
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
THOUGHT_STEPS = 8  # of a thought video, the last shown step included; one for each of K = 8 slots
CRF = 12  # near-lossless, so that the world and not the codec sets the difficulty
ASKED = (*PERCEPTION_FAMILIES, "tile", "tile", "position")  # these three need the most practice
Kind = Literal["reasoning", "perception", "grounding"]


def build_world(
    folder: str | Path,
    kind: Kind,
    split: Split,
    count: int,
    seed: int = 0,
    continued: bool = False,
    questions: int = 1,
) -> Path:
    """Write `count` scenes of one split and their rows; returns the path of the row file.

    A reasoning scene has one question and a thought video; a perception scene has a question of every family that
    fits it; a grounding scene is asked when something is the case, and what happens. Splits never share a scene: each
    draws from a random stream of its own. Files that are there are kept, so an interrupted call can be repeated.
    `continued` clips go on after what is to be seen of them (`Row.end`), as real videos do: the real future, cover
    and all. `questions` of different families are asked about each reasoning scene (retrieval probe, paper sec. A.1).
    """
    folder = Path(folder)
    drawn = f"{kind}-{split}-{seed}" + (f"-x{questions}" if questions > 1 else "")
    names = (f"{drawn}-{i:05d}" for i in range(count))
    path = folder / f"{drawn}{'-continued' if continued else ''}.jsonl"
    with exclusive(folder, path.stem), thread_pool() as pool:  # encoding leaves Python's lock alone
        for part in ("clips", "thoughts"):
            (folder / part).mkdir(exist_ok=True)
        written = pool.map(
            lambda name, scene: _write_scene(folder, name, split, count, continued, *scene),
            names,
            draw_scenes(kind, split, count, seed, questions),
        )
        progress = tqdm(written, f"{split} clips", total=count, leave=False)
        rows = [row for scene_rows in progress for row in scene_rows]
        write_rows(path, rows)
    return path


def draw_scenes(
    kind: Kind, split: Split, count: int, seed: int, questions: int = 1
) -> Iterator[tuple[Scene, list[Question]]]:
    """The scenes of `build_world`, with their questions; the same arguments give the same scenes."""
    rng = random.Random(f"{kind}/{split}/{seed}")
    if kind != "reasoning":
        yield from (sample_perception if kind == "perception" else sample_grounding)(rng, count)
        return
    far = split == "ood"
    difficulty, horizon = (OUT_OF_DISTRIBUTION, FAR_HORIZON) if far else (REASONING, HORIZON)
    if questions > 1:
        yield from sample_several(rng, difficulty, count, horizon, questions)
        return
    for scene, question in sample_reasoning(rng, difficulty, count, horizon):
        yield scene, [question]


def _write_scene(
    folder: Path,
    name: str,
    split: Split,
    count: int,
    continued: bool,
    scene: Scene,
    questions: Sequence[Question],
) -> list[Row]:
    # What a file shows is in its name: a call with another count would else keep what it finds.
    shown = repr((scene.tiles, scene.tracks, sorted(scene.cover), questions, continued))
    file = f"{name}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}.mp4"
    clip = folder.absolute() / "clips" / file
    if not clip.exists():
        frames = clip_frames(prolonged(scene, THOUGHT_STEPS) if continued else scene)
        write_video(clip, frames, FPS, crf=CRF)
    return [
        Row(
            id=f"{name}-{j}",
            video=str(clip),
            end=(scene.shown_steps * FRAMES_PER_STEP - 0.5) / FPS if continued else None,
            question=question.text,
            answer=question.answer,
            keyframes=(scene.now * FRAMES_PER_STEP / FPS,),
            plan=plan(scene, question) if question.steps else None,
            thought_video=_thought_video(folder, f"{j}-{file}" if j else file, scene, question)
            if question.steps
            else None,
            split=split,
            meta={
                "family": question.family,
                "steps": question.steps,
                "balls": len(scene.tracks),
                "scenes": count,  # answers are balanced over all, so that scenes depend on it
                "shortcuts": shortcuts(scene, question) if question.steps else {},
                **({"moment": question.moment} if question.moment else {}),
            },
        )
        for j, question in enumerate(questions)
    ]


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


def _thought_video(folder: Path, file: str, scene: Scene, question: Question) -> ThoughtVideo:
    path = folder.absolute() / "thoughts" / file
    if not path.exists():
        write_video(
            path, thought_frames(scene, question.steps, THOUGHT_STEPS, question.ball), FPS, crf=CRF
        )
    return ThoughtVideo(
        path=str(path),
        source="oracle",
        generator=f"storm_vlm.lab.world {version('storm-vlm')}",
        provenance={"hidden_steps": question.steps, "steps": THOUGHT_STEPS},
    )
