"""The micro world's oracle as a generator: the scene is drawn again from the row's id and simulated on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from storm_vlm.configs import Settings
from storm_vlm.construction.types import Generator, Imagined, Rejected, Request
from storm_vlm.data.row import Row, ThoughtSource
from storm_vlm.data.video import write_video
from storm_vlm.lab.world.clips import CRF, THOUGHT_STEPS, with_thought_video
from storm_vlm.lab.world.mirrors import draw_scenes
from storm_vlm.lab.world.render import FPS, thought_frames
from storm_vlm.lab.world.wrong import Asked, fault_of, spoiled


class World(Generator):
    source: ClassVar[ThoughtSource] = "oracle"
    name = "storm_vlm.lab.world"

    def determined_by(self, request: Request) -> dict[str, Any]:
        return {"id": request.row.id, "scenes": request.row.meta.get("scenes")}

    def imagine(self, request: Request) -> Imagined:
        scene, question = self.shown(request.row)
        return Imagined(thought_frames(scene, question.steps, THOUGHT_STEPS, question.ball), FPS)

    def shown(self, row: Row) -> Asked:
        """What the row's thought video shows. Raises Rejected if the row is not of this world."""
        try:
            scenes, index = _drawn_with(row)
            scene, question = scenes[index]
        except (KeyError, ValueError, IndexError) as error:
            raise Rejected("no_scene", f"{row.id!r} is no reasoning row of storm world") from error
        if (question.text, question.answer) != (row.question, row.answer):
            raise Rejected("no_scene", f"{row.id!r} is of another version of the micro world")
        return scene, question


class ErringConfig(Settings):
    wrong: float = Field(0.25, ge=0, le=1, description="Share of rows whose videos are wrong.")


class ErringWorld(World):
    """The generator `erring_world`: some of its videos are wrong, and all are judged as a generator's."""

    Config = ErringConfig
    source: ClassVar[ThoughtSource] = "generated"
    name = "storm_vlm.lab.world, erring"

    def shown(self, row: Row) -> Asked:
        asked = super().shown(row)
        if (fault := fault_of(row.id, self.config.wrong)) is None:
            return asked
        scenes, index = _drawn_with(row)
        return spoiled(*asked, fault, scenes[(index + 1) % len(scenes)], row.id)


def _drawn_with(row: Row) -> tuple[list[Asked], int]:
    """All scenes of the row's split, and which is its own."""
    kind, split, seed, index, _ = row.id.split("-")
    return _scenes(kind, split, int(row.meta["scenes"]), int(seed)), int(index)


@cache
def _scenes(kind: Any, split: Any, count: int, seed: int) -> list[Asked]:
    return [(scene, question) for scene, (question,) in draw_scenes(kind, split, count, seed)]


def with_wrong_thoughts(rows: Sequence[Row], folder: Path, share: float) -> list[Row]:
    """Rows of `build_world`, with `share` of the thought videos wrong; their `provenance` says how (`wrong`)."""
    world, found = ErringWorld(ErringConfig(wrong=share), 0), []
    folder.mkdir(exist_ok=True)
    for row in rows:
        fault, thought = fault_of(row.id, share), row.thought_video
        if fault and thought:
            path = folder.absolute() / f"{fault}-{Path(thought.path).name}"
            if not path.exists():
                imagined = world.imagine(Request(row, (), ""))
                write_video(path, imagined.frames, imagined.fps, crf=CRF)
            row = with_thought_video(row, path, wrong=fault)
        found.append(row)
    return found
