"""The physics of the micro world: balls roll over a small board and meet walls, mirrors, pads and blocks.

Time goes in steps. In one step a ball tries to enter the next cell along its heading:

* a wall or a block stops it: it stays in its cell and turns round (a block remembers being hit);
* a mirror (`slash` or `backslash`) turns it by a right angle as it passes;
* a pad paints it;
* anything else lets it through.

One step needs one look at one cell, and the next step needs the result: what happens after `n` steps
is a chain of `n` look-ups, which is what makes a question about the unseen part a *reasoning* question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

SIZE = 4
COLOURS = ("red", "green", "blue", "yellow")
HEADINGS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}  # (row, column)
MIRRORS = {
    "slash": {"right": "up", "up": "right", "left": "down", "down": "left"},
    "backslash": {"right": "down", "down": "right", "left": "up", "up": "left"},
}
Cell = tuple[int, int]


def cell_name(cell: Cell) -> str:
    """`(row, column)` counted from the top left -> `a1` … `d4`: a letter for the column, a digit for the row."""
    return f"{'abcdefgh'[cell[1]]}{cell[0] + 1}"


def opposite(heading: str) -> str:
    names = list(HEADINGS)
    return names[(names.index(heading) + 2) % 4]


@dataclass(frozen=True)
class Tile:
    """What lies in a cell: `slash`, `backslash`, `pad` or `block`; the last two have a colour."""

    kind: str
    colour: str | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}" if self.colour else self.kind


@dataclass(frozen=True)
class Ball:
    """A ball during one step: it comes into `cell` heading `came` and leaves (or would) heading `heading`.

    A slow ball (`period` 2) needs two steps for a cell; `phase` counts them.
    """

    cell: Cell
    heading: str
    colour: str
    came: str = ""
    period: int = 1
    phase: int = 0
    hit: str | None = None  # what stopped it in this step: "wall" or a block's name


@dataclass(frozen=True)
class Scene:
    """A board, the balls at every step, and the cells under the cover (hidden after the first step)."""

    tiles: dict[Cell, Tile]
    tracks: tuple[tuple[Ball, ...], ...]  # tracks[ball][step]
    shown_steps: int
    cover: frozenset[Cell] = field(default_factory=frozenset)

    @property
    def now(self) -> int:
        """The last step that the clip shows."""
        return self.shown_steps - 1

    def board(self, index: int) -> dict[Cell, Tile]:
        """The tiles at that step."""
        return self.tiles

    def in_the_light(self, index: int, ball: int) -> list[Cell]:
        """What a thought video shows of that step: the ball's cell, and the block that it hits."""
        now = self.tracks[ball][index]
        if now.hit in (None, "wall"):
            return [now.cell]
        rows, columns = HEADINGS[now.came]
        return [now.cell, (now.cell[0] + rows, now.cell[1] + columns)]

    def after(self, n: int, ball: int = 0) -> Ball:
        """The ball `n` steps after the last one shown."""
        return self.tracks[ball][self.now + n]


def step(tiles: dict[Cell, Tile], ball: Ball) -> Ball:
    """One step of one ball. Balls do not meet each other."""
    if ball.phase + 1 < ball.period:
        return replace(ball, phase=ball.phase + 1, hit=None)
    rows, columns = HEADINGS[ball.heading]
    target = (ball.cell[0] + rows, ball.cell[1] + columns)
    tile = tiles.get(target)
    inside = 0 <= target[0] < SIZE and 0 <= target[1] < SIZE
    if not inside or (tile is not None and tile.kind == "block"):
        hit = tile.name if tile is not None else "wall"
        turned = opposite(ball.heading)
        return replace(ball, came=ball.heading, heading=turned, phase=0, hit=hit)
    heading, colour = ball.heading, ball.colour
    if tile is not None and tile.kind in MIRRORS:
        heading = MIRRORS[tile.kind][heading]
    if tile is not None and tile.kind == "pad" and tile.colour is not None:
        colour = tile.colour
    return replace(
        ball, cell=target, came=ball.heading, heading=heading, colour=colour, phase=0, hit=None
    )


def simulate(tiles: dict[Cell, Tile], ball: Ball, steps: int) -> tuple[Ball, ...]:
    """The ball at steps 0 … `steps` - 1."""
    track = [ball]
    while len(track) < steps:
        track.append(step(tiles, track[-1]))
    return tuple(track)


@dataclass(frozen=True)
class Difficulty:
    """How full and how long a scene is; ranges are inclusive."""

    mirrors: tuple[int, int] = (3, 6)
    pads: tuple[int, int] = (1, 2)
    blocks: tuple[int, int] = (2, 3)
    balls: tuple[int, int] = (1, 1)
    slow_chance: float = 0.0
    cover_chance: float = 0.2
    shown_steps: int = 3
    hidden_steps: int = 7


REASONING = Difficulty()
PERCEPTION = replace(
    REASONING, mirrors=(0, 6), pads=(0, 2), blocks=(0, 3), balls=(1, 3), slow_chance=0.4
)
CROWDED = replace(REASONING, mirrors=(3, 7), balls=(1, 2))
OUT_OF_DISTRIBUTION = replace(REASONING, mirrors=(5, 7), balls=(2, 2))


def sample_scene(rng: random.Random, difficulty: Difficulty) -> Scene:
    """Draw a scene. The same `rng` state gives the same scene."""
    cells = [(row, column) for row in range(SIZE) for column in range(SIZE)]
    rng.shuffle(cells)
    counts = {
        kind: rng.randint(*getattr(difficulty, kind)) for kind in ("mirrors", "pads", "blocks")
    }
    tiles: dict[Cell, Tile] = {}
    for _ in range(counts["mirrors"]):
        tiles[cells.pop()] = Tile(rng.choice(sorted(MIRRORS)))
    for kind in ("pad", "block"):
        for colour in rng.sample(COLOURS, counts[kind + "s"]):  # so that a colour names one tile
            tiles[cells.pop()] = Tile(kind, colour)
    colours = rng.sample(COLOURS, rng.randint(*difficulty.balls))
    steps = difficulty.shown_steps + difficulty.hidden_steps
    tracks = []
    for colour in colours:
        heading = rng.choice(list(HEADINGS))
        period = 2 if rng.random() < difficulty.slow_chance else 1
        ball = Ball(cells.pop(), heading, colour, came=heading, period=period)
        tracks.append(simulate(tiles, ball, steps))
    cover: frozenset[Cell] = frozenset()
    if rng.random() < difficulty.cover_chance:
        row, column = rng.randrange(SIZE - 1), rng.randrange(SIZE - 1)
        panel = {(row + i, column + j) for i in (0, 1) for j in (0, 1)}
        # The ball must be in sight until the clip ends, or the question has no answer.
        if not any(
            track[s].cell in panel for track in tracks for s in range(difficulty.shown_steps)
        ):
            cover = frozenset(panel)
    return Scene(tiles, tuple(tracks), difficulty.shown_steps, cover)
