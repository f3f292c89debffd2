"""The generator `world`, the micro world's oracle: the scene is drawn again from the row's id and simulated on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from storm_vlm.configs import Settings
from storm_vlm.construction.types import Generator, Imagined, Rejected, Request
from storm_vlm.data.row import Row
from storm_vlm.data.video import write_video
from storm_vlm.lab.world.clips import CRF, THOUGHT_STEPS, draw_scenes
from storm_vlm.lab.world.questions import Question
from storm_vlm.lab.world.render import FPS, thought_frames
from storm_vlm.lab.world.simulator import Scene
from storm_vlm.lab.world.wrong import fault_of, spoiled


class WorldConfig(Settings):
    wrong: float = Field(
        0.0, ge=0, le=1, description="Share of rows whose thought videos are wrong (a study)."
    )


class World(Generator):
    """An oracle, or, where some are wrong, a generator that errs, and is judged as one."""

    Config = WorldConfig
    name = "storm_vlm.lab.world"

    def __init__(self, config: WorldConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.source = "generated" if config.wrong else "oracle"

    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(exclude_defaults=True)

    def determined_by(self, request: Request) -> dict[str, Any]:
        return {"id": request.row.id, "scenes": request.row.meta.get("scenes")}

    def imagine(self, request: Request) -> Imagined:
        row = request.row
        try:
            kind, split, seed, index, _ = row.id.split("-")
            scenes = _scenes(kind, split, int(row.meta["scenes"]), int(seed))
            scene, question = scenes[int(index)]
        except (KeyError, ValueError, IndexError) as error:
            raise Rejected("no_scene", f"{row.id!r} is no reasoning row of storm world") from error
        if (question.text, question.answer) != (row.question, row.answer):
            raise Rejected("no_scene", f"{row.id!r} is of another version of the micro world")
        if fault := fault_of(row.id, self.config.wrong):
            other = scenes[(int(index) + 1) % len(scenes)]
            scene, question = spoiled(scene, question, fault, other, row.id)
        return Imagined(thought_frames(scene, question.steps, THOUGHT_STEPS, question.ball), FPS)


@cache
def _scenes(kind: Any, split: Any, count: int, seed: int) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene, (question,) in draw_scenes(kind, split, count, seed)]


def with_wrong_thoughts(rows: Sequence[Row], share: float, folder: Path) -> list[Row]:
    """Rows of `build_world`, with `share` of the thought videos wrong; their `provenance` says how (`wrong`)."""
    world, found = World(WorldConfig(wrong=share), 0), []
    folder.mkdir(exist_ok=True)
    for row in rows:
        fault, thought = fault_of(row.id, share), row.thought_video
        if fault and thought:
            path = folder.absolute() / f"{fault}-{Path(thought.path).name}"
            if not path.exists():
                imagined = world.imagine(Request(row, (), ""))
                write_video(path, imagined.frames, imagined.fps, crf=CRF)
            changes = {"path": str(path), "provenance": {**thought.provenance, "wrong": fault}}
            row = row.model_copy(update={"thought_video": thought.model_copy(update=changes)})
        found.append(row)
    return found
