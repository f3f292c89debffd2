"""Draw the micro world as frames.

Every cell has a background colour of its own. That is not decoration: Qwen2.5-VL's vision tower knows only
relative positions, and the alignment targets of the paper *average* visual tokens, so where something is must
be readable from what a patch shows.

A ball has an eye that looks where it is heading.

A step is two frames: the ball entering its cell and leaving it. Qwen2.5-VL merges two frames into one
temporal grid, so one step is one grid, and with K steps in a thought video adaptive pooling gives slot k
exactly step k.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np

from storm_vlm.lab.world.simulator import HEADINGS, SIZE, Ball, Cell, Scene, Tile

CELL = 32  # pixels; a frame is SIZE * CELL squared
FRAMES_PER_STEP = 2
FPS = 4.0  # two steps a second
THOUGHT_STEPS = 8  # of a thought video, the last shown step included; one for each of K = 8 slots
BALL, RING, EYE = 8, 4, 4  # pixels: radius of a ball, width of its ring, radius of its eye
REACH = 4  # pixels that a ball gets away from the middle of its cell
DARK = 32  # grey level outside the spotlight
PAINT = {
    "red": (225, 30, 30),
    "green": (20, 190, 40),
    "blue": (30, 60, 235),
    "yellow": (250, 225, 20),
}
Frame = np.ndarray  # (H, W, 3) uint8


def _ground(row: int, column: int) -> tuple[int, int, int]:
    hue = (column * 4 + row * 9 % 16 + 0.5) / 16 % 1.0
    light = (0.27, 0.66, 0.44, 0.80)[row]
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.45)
    return int(red * 255), int(green * 255), int(blue * 255)


_Y, _X = np.mgrid[0:CELL, 0:CELL] + 0.5
_YS, _XS = np.mgrid[0 : SIZE * CELL, 0 : SIZE * CELL] + 0.5
_MIDDLE = CELL / 2


def _tile_mask(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(outline, body) masks of a tile within its cell."""
    if kind in ("slash", "backslash"):
        distance = np.abs(_X + _Y - CELL) if kind == "slash" else np.abs(_X - _Y)
        return distance < 6, distance < 0
    side = np.maximum(np.abs(_X - _MIDDLE), np.abs(_Y - _MIDDLE))
    if kind == "pad":  # a frame, so that a ball on it leaves it visible
        return side > CELL / 2 - 6, side > CELL / 2 - 5
    return side < 11, side < 9


def _ball_centre(ball: Ball, late: bool) -> tuple[float, float]:
    """Where the ball is in its cell: it comes in from behind `came` and goes out along `heading`."""
    progress = (ball.phase + (0.75 if late else 0.25)) / ball.period  # 0 … 1 through the cell
    reach = abs(progress - 0.5) * 2 * REACH
    if ball.hit is not None and not late:
        rows, columns = HEADINGS[ball.came]  # pressed against what stopped it
    elif progress < 0.5:
        rows, columns = (-x for x in HEADINGS[ball.came])
    else:
        rows, columns = HEADINGS[ball.heading]
    y, x = (index * CELL + _MIDDLE for index in ball.cell)
    return y + rows * reach, x + columns * reach


def _board(tiles: Mapping[Cell, Tile]) -> Frame:
    """The ground and the tiles."""
    frame = np.empty((SIZE * CELL, SIZE * CELL, 3), np.uint8)
    for row in range(SIZE):
        for column in range(SIZE):
            cell = _cell(frame, row, column)
            cell[:] = _ground(row, column)
            tile = tiles.get((row, column))
            if tile is not None:
                outline, body = _tile_mask(tile.kind)
                cell[outline] = (0, 0, 0)
                if tile.colour is not None:
                    cell[body] = PAINT[tile.colour]
    return frame


def _cell(frame: Frame, row: int, column: int) -> Frame:
    return frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def _draw(board: Frame, scene: Scene, index: int, late: bool, covered: bool) -> Frame:
    """One frame of step `index`: its first half, or (`late`) its second; `covered` draws the cover."""
    frame = board.copy()
    for track in scene.tracks:
        y, x = _ball_centre(track[index], late)
        distance = np.hypot(_YS - y, _XS - x)
        frame[distance < BALL + RING] = (255, 255, 255)  # nothing else is white
        frame[distance < BALL] = PAINT[track[index].colour]
        rows, columns = HEADINGS[track[index].heading if late else track[index].came]
        frame[np.hypot(_YS - y - rows * BALL, _XS - x - columns * BALL) < EYE] = (0, 0, 0)
    if covered:
        for row, column in scene.cover:
            # A tint of the ground stays, as through frosted glass: which cells are covered can be seen.
            stripes = np.where((_X + _Y) % 16 < 8, 90, 150)[..., None]
            _cell(frame, row, column)[:] = stripes // 2 + np.array(_ground(row, column)) // 2
    return frame


def clip_frames(scene: Scene) -> np.ndarray:
    """The part that is shown, (T, H, W, 3) uint8; the cover falls after the first step."""
    board = _board(scene.tiles)
    return np.stack(
        [
            _draw(board, scene, index, late, covered=index > 0)
            for index in range(scene.shown_steps)
            for late in (False, True)
        ]
    )


def thought_frames(
    scene: Scene, hidden_steps: int, length: int, ball: int = 0, asked: Sequence[Cell] = ()
) -> np.ndarray:
    """The oracle's thought video, (2 * length, H, W, 3) uint8: the unseen part, with a spotlight on the ball.

    As an image-to-video model would, it starts from the last step shown; then come the hidden steps that
    the question asks about, and the last of them is held until `length` steps are filled. Only the cell of
    the ball asked about is lit, what else it changes, and cells `asked` about: a thought video is there to show
    what matters to the question, and a pooled target should not be about the rest of the board.
    """
    frames = []
    for k in range(length):
        index = scene.now + min(k, hidden_steps)
        board, lit = _board(scene.board(index)), [*scene.in_the_light(index, ball), *asked]
        for late in (False, True):
            frame = _draw(board, scene, index, late, covered=False)
            dark = np.full_like(frame, DARK)
            for row, column in lit:
                _cell(dark, row, column)[:] = _cell(frame, row, column)
            frames.append(dark)
    return np.stack(frames)
