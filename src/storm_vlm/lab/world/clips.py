"""Write a micro world to disk: MP4 clips, thought videos and rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from storm_vlm.data.output import exclusive
from storm_vlm.data.row import Row, Split, ThoughtVideo, write_rows
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.data.video import write_video
from storm_vlm.errors import InputError
from storm_vlm.lab.world import mirrors, puzzle, questions
from storm_vlm.lab.world.questions import Question
from storm_vlm.lab.world.render import (
    FPS,
    FRAMES_PER_STEP,
    THOUGHT_STEPS,
    clip_frames,
    thought_frames,
)
from storm_vlm.lab.world.simulator import CROWDED, Scene

CRF = 12  # near-lossless, so that the world and not the codec sets the difficulty
Kind = Literal["reasoning", "perception", "grounding"]


@dataclass(frozen=True)
class World:
    """What differs from one world to another: its scenes, and how to answer about them, rightly and not.

    `prolonged`: a scene with more of its steps shown; None: its clips do not go on. With `own_slots`, a row takes a
    slot for each step of its thought, the last one shown included.
    """

    draw_scenes: Callable[[Kind, Split, int, int, int], Iterator[tuple[Any, list[Question]]]]
    plan: Callable[[Any, Question], str]
    shortcuts: Callable[[Any, Question], dict[str, str]]
    prolonged: Callable[[Any, int], Any] | None = mirrors.prolonged
    own_slots: bool = False


WorldName = Literal["mirrors", "chains", "crowded", "puzzle"]
WORLDS: dict[WorldName, World] = {
    "mirrors": World(mirrors.draw_scenes, questions.plan, mirrors.shortcuts),
    "chains": World(
        partial(mirrors.draw_scenes, near=mirrors.ANY_HORIZON),
        questions.plan,
        mirrors.shortcuts,
        own_slots=True,
    ),
    "crowded": World(
        partial(mirrors.draw_scenes, near=mirrors.ANY_HORIZON, near_difficulty=CROWDED),
        questions.plan,
        mirrors.shortcuts,
        own_slots=True,
    ),
    "puzzle": World(puzzle.draw_scenes, puzzle.plan, puzzle.shortcuts, prolonged=None),
}


def build_world(
    folder: str | Path,
    kind: Kind,
    split: Split,
    count: int,
    seed: int = 0,
    continued: bool = False,
    questions: int = 1,
    world: WorldName = "mirrors",
) -> Path:
    """Write `count` scenes of one split and their rows; returns the path of the row file.

    A reasoning scene has one question and a thought video; a perception scene has a question of every family that
    fits it; a grounding scene is asked when something is the case, and what happens. Splits never share a scene: each
    draws from a random stream of its own. Files that are there are kept, so an interrupted call can be repeated.
    `continued` clips go on after what is to be seen of them (`Row.end`), as real videos do: the real future, cover
    and all. `questions` of different families are asked about each reasoning scene (retrieval probe, paper sec. A.1).

    Raises:
        InputError: the world has no such clips or questions.
    """
    if continued and WORLDS[world].prolonged is None:
        raise InputError(f"the world {world!r} has no clips that go on: leave out `continued`")
    folder = Path(folder)
    drawn = ("" if world == "mirrors" else f"{world}-") + f"{kind}-{split}-{seed}"
    drawn += f"-x{questions}" if questions > 1 else ""
    names = (f"{drawn}-{i:05d}" for i in range(count))
    path = folder / f"{drawn}{'-continued' if continued else ''}.jsonl"
    with exclusive(folder, path.stem), thread_pool() as pool:  # encoding leaves Python's lock alone
        for part in ("clips", "thoughts"):
            (folder / part).mkdir(exist_ok=True)
        written = pool.map(
            lambda name, scene: _write_scene(
                WORLDS[world], folder, name, split, count, continued, *scene
            ),
            names,
            WORLDS[world].draw_scenes(kind, split, count, seed, questions),
        )
        progress = tqdm(written, f"{split} clips", total=count, leave=False)
        rows = [row for scene_rows in progress for row in scene_rows]
        write_rows(path, rows)
    return path


def _write_scene(
    world: World,
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
        longer = continued and world.prolonged and world.prolonged(scene, THOUGHT_STEPS)
        write_video(clip, clip_frames(longer or scene), FPS, crf=CRF)
    return [
        Row(
            id=f"{name}-{j}",
            video=str(clip),
            end=_end_of(scene.shown_steps) if continued else None,
            question=question.text,
            answer=question.answer,
            keyframes=(scene.now * FRAMES_PER_STEP / FPS,),
            plan=world.plan(scene, question) if question.steps else None,
            thought_video=_thought_video(
                world, folder, f"{j}-{file}" if j else file, scene, question
            )
            if question.steps
            else None,
            slots=question.steps + 1 if world.own_slots and question.steps else None,
            split=split,
            meta={
                "family": question.family,
                "steps": question.steps,
                "balls": len(scene.tracks),
                "scenes": count,  # answers are balanced over all, so that scenes depend on it
                "shortcuts": world.shortcuts(scene, question) if question.steps else {},
                **({"moment": question.moment} if question.moment else {}),
            },
        )
        for j, question in enumerate(questions)
    ]


def _end_of(steps: int) -> float:
    """Seconds: after the last frame of so many steps, before the next."""
    return (steps * FRAMES_PER_STEP - 0.5) / FPS


def _thought_video(
    world: World, folder: Path, file: str, scene: Scene, question: Question
) -> ThoughtVideo:
    path = folder.absolute() / "thoughts" / file
    if not path.exists():
        lit = [question.cell] if question.cell else []
        frames = thought_frames(scene, question.steps, THOUGHT_STEPS, question.ball, lit)
        write_video(path, frames, FPS, crf=CRF)
    return ThoughtVideo(
        path=str(path),
        end=_end_of(question.steps + 1) if world.own_slots else None,
        source="oracle",
        generator=f"storm_vlm.lab.world {version('storm-vlm')}",
        provenance={"hidden_steps": question.steps, "steps": THOUGHT_STEPS},
    )


def with_thought_video(row: Row, path: Path, **noted: str) -> Row:
    """The row with another file for its thought video, and a note of what is different in the provenance."""
    assert row.thought_video is not None
    provenance = {**row.thought_video.provenance, **noted}
    thought = row.thought_video.model_copy(update={"path": str(path), "provenance": provenance})
    return row.model_copy(update={"thought_video": thought})
