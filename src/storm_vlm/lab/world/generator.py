"""The generator `world`, the micro world's oracle: the scene is drawn again from the row's id and simulated on."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from storm_vlm.construction.types import Generator, Imagined, Rejected, Request
from storm_vlm.data.row import ThoughtSource
from storm_vlm.lab.world.clips import THOUGHT_STEPS, draw_scenes
from storm_vlm.lab.world.render import FPS, thought_frames


class World(Generator):
    source: ClassVar[ThoughtSource] = "oracle"
    name = "storm_vlm.lab.world"

    def determined_by(self, request: Request) -> dict[str, Any]:
        return {"id": request.row.id, "scenes": request.row.meta.get("scenes")}

    def imagine(self, request: Request) -> Imagined:
        row = request.row
        try:
            kind, split, seed, index, _ = row.id.split("-")
            scenes = _scenes(kind, split, int(row.meta["scenes"]), int(seed))
            scene, (question,) = scenes[int(index)]
        except (KeyError, ValueError, IndexError) as error:
            raise Rejected("no_scene", f"{row.id!r} is no reasoning row of storm world") from error
        if (question.text, question.answer) != (row.question, row.answer):
            raise Rejected("no_scene", f"{row.id!r} is of another version of the micro world")
        return Imagined(thought_frames(scene, question.steps, THOUGHT_STEPS, question.ball), FPS)


@cache
def _scenes(kind: Any, split: Any, count: int, seed: int) -> list[Any]:
    return list(draw_scenes(kind, split, count, seed))
