"""The second world, a sliding puzzle: the ball and what it rolls upon change places.

It looks like the world of mirrors, so that one backbone sees both, but what happens is of another kind: there the
board changes the ball, here the ball changes the board, too. A piece in the cell that the ball enters is put into the
cell that the ball leaves; a block then makes the ball turn right, a pad left. A wall keeps it where it is, and makes
it turn right.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from storm_vlm.data.row import Split
from storm_vlm.errors import InputError
from storm_vlm.lab.world.mirrors import ASKED, FAR_HORIZON, HORIZON
from storm_vlm.lab.world.questions import Question, ask_perception, balanced
from storm_vlm.lab.world.simulator import (
    COLOURS,
    HEADINGS,
    SIZE,
    Ball,
    Cell,
    Scene,
    Tile,
    cell_name,
)

SHOWN_STEPS, HIDDEN_STEPS = 3, 7
TURNS = {"block": 1, "pad": -1}  # quarters, to the right
SHARES = {"where": 0.4, "lies": 0.6}
CELLS = [(row, column) for row in range(SIZE) for column in range(SIZE)]
PIECES = [Tile(kind, colour) for kind in TURNS for colour in COLOURS]
Board = dict[Cell, Tile]


@dataclass(frozen=True)
class Puzzle(Scene):
    """A scene whose tiles do not stay where they are; `tiles` are those of the first step."""

    boards: tuple[Board, ...] = ()  #: at every step

    def board(self, index: int) -> Board:
        return self.boards[index]

    def in_the_light(self, index: int, ball: int) -> list[Cell]:
        """The ball's cell, and the one that it has left."""
        return sorted({self.tracks[ball][i].cell for i in (index - 1, index)})


def slide(board: Board, ball: Ball, turns: bool = True) -> tuple[Board, Ball]:
    """One step; without `turns`, of a ball that no piece turns."""
    target = _ahead(ball.cell, ball.heading)
    if target not in CELLS:
        return board, replace(ball, came=ball.heading, heading=_turned(ball.heading, 1), hit="wall")
    piece = board.get(target)
    after = {cell: tile for cell, tile in board.items() if cell != target}
    if piece:
        after[ball.cell] = piece
    quarters = TURNS[piece.kind] if piece and turns else 0
    heading = _turned(ball.heading, quarters)
    return after, replace(ball, cell=target, came=ball.heading, heading=heading, hit=None)


def _ahead(cell: Cell, heading: str, steps: int = 1) -> Cell:
    rows, columns = HEADINGS[heading]
    return cell[0] + steps * rows, cell[1] + steps * columns


def _turned(heading: str, quarters: int) -> str:
    names = list(HEADINGS)
    return names[(names.index(heading) + quarters) % 4]


def simulate(board: Board, ball: Ball, steps: int, turns: int | None = None) -> Puzzle:
    """Steps 0 … `steps` - 1; after `turns` of them (None: never) pieces turn the ball no longer."""
    boards, track = [board], [ball]
    while len(track) < steps:
        turning = turns is None or sum(_by_a_piece(ball) for ball in track) < turns
        board, ball = slide(board, ball, turning)
        boards.append(board)
        track.append(ball)
    return Puzzle(boards[0], (tuple(track),), SHOWN_STEPS, boards=tuple(boards))


def _by_a_piece(ball: Ball) -> bool:
    return ball.heading != ball.came and ball.hit is None


def sample_puzzle(rng: random.Random) -> Puzzle:
    """All eight pieces on the board; while it is shown, the ball rolls over empty cells."""
    heading = rng.choice(list(HEADINGS))
    start = rng.choice([cell for cell in CELLS if _ahead(cell, heading, SHOWN_STEPS - 1) in CELLS])
    way = [_ahead(start, heading, steps) for steps in range(SHOWN_STEPS)]
    cells = rng.sample([cell for cell in CELLS if cell not in way], len(PIECES))
    ball = Ball(start, heading, rng.choice(COLOURS), came=heading)
    board = dict(zip(cells, PIECES, strict=True))
    return simulate(board, ball, SHOWN_STEPS + HIDDEN_STEPS)


def draw_scenes(
    kind: str, split: Split, count: int, seed: int, questions: int = 1
) -> Iterator[tuple[Puzzle, list[Question]]]:
    """As the mirrors' function of this name.

    Raises:
        InputError: the puzzle has no grounding questions, and one reasoning question a scene.
    """
    if kind == "grounding" or questions > 1:
        raise InputError(
            "the puzzle has no grounding questions, and one reasoning question a scene"
        )
    rng = random.Random(f"puzzle/{kind}/{split}/{seed}")
    if kind == "perception":
        for _ in range(count):
            puzzle = sample_puzzle(rng)
            asked = (ask_perception(puzzle, rng, family) for family in ASKED)
            yield puzzle, [question for question in asked if question is not None]
        return
    first, last = FAR_HORIZON if split == "ood" else HORIZON

    def ask(puzzle: Puzzle, family: str) -> list[Question]:
        return [q for n in range(first, last + 1) for q in ask_reasoning(puzzle, family, n)]

    for puzzle, question in balanced(rng, count, SHARES, lambda: sample_puzzle(rng), ask):
        yield puzzle, [question]


def ask_reasoning(puzzle: Puzzle, family: str, n: int) -> list[Question]:
    """All questions of `family` about step `n`: where the ball is, or what lies in a cell that it has left by then.

    Two pieces must have turned the ball before it came there, or left that cell for the last time; and three pieces
    must lie beside such a cell, or a guess among them would do.
    """
    path = [puzzle.after(i) for i in range(n + 1)]
    turned = [sum(map(_by_a_piece, path[1:i])) >= 2 for i in range(n + 1)]
    then = f"after {n} more steps"
    if family == "where":
        asked = Question(family, f"Where will the ball be {then}?", cell_name(path[n].cell), n)
        return [asked] if turned[n] else []
    left = {a.cell: i for i, (a, b) in enumerate(itertools.pairwise(path), 1) if a.cell != b.cell}
    return [
        Question(
            family,
            f"What will lie at {cell_name(cell)} {then}?",
            _lying(puzzle, n, cell),
            n,
            cell=cell,
        )
        for cell, i in left.items()
        if turned[i] and cell != path[n].cell and len(_beside(puzzle, cell)) >= 3
    ]


def _lying(puzzle: Puzzle, n: int, cell: Cell) -> str:
    """What lies there `n` steps after the last one shown."""
    piece = puzzle.board(puzzle.now + n).get(cell)
    return piece.name if piece else "nothing"


def _beside(puzzle: Puzzle, cell: Cell) -> list[str]:
    """The pieces next to a cell when the clip ends, those nearest to the ball first."""
    row, column = puzzle.after(0).cell
    cells = sorted(
        (_ahead(cell, heading) for heading in HEADINGS),
        key=lambda c: abs(c[0] - row) + abs(c[1] - column),
    )
    board = puzzle.board(puzzle.now)
    return [board[c].name for c in cells if c in board]


def shortcuts(puzzle: Puzzle, question: Question) -> dict[str, str]:
    """What five ways to answer without simulating would say.

    Two are as the mirrors': what holds when the clip ends, and a ball that no piece turns. In `one_turn` only the
    first piece does. `near` and `far`: of the pieces beside the cell asked about, the ball's nearest, or farthest.
    """

    def told(other: Puzzle, n: int) -> str:
        if question.cell is None:
            return cell_name(other.after(n).cell)
        return _lying(other, n, question.cell)

    def turning(turns: int) -> str:
        other = simulate(puzzle.tiles, puzzle.tracks[0][0], len(puzzle.boards), turns)
        return told(other, question.steps)

    beside = _beside(puzzle, question.cell) if question.cell else [""]
    return {
        "last_seen": told(puzzle, 0),
        "straight_line": turning(0),
        "one_turn": turning(1),
        "near": beside[0],
        "far": beside[-1],
    }


def plan(puzzle: Puzzle, question: Question) -> str:
    """One clause for each hidden step, as a teacher would write it."""

    def clause(n: int) -> str:
        last, ball = puzzle.after(n - 1), puzzle.after(n)
        if ball.hit:
            return f"hits the wall, turns {ball.heading}"
        piece = puzzle.board(puzzle.now + n).get(last.cell)
        if piece is None:
            return cell_name(ball.cell)
        put = f"{piece.name} to {cell_name(last.cell)}"
        return f"{cell_name(ball.cell)}, turns {ball.heading}, {put}"

    start = puzzle.after(0)
    path = "; ".join(f"step {n}: {clause(n)}" for n in range(1, question.steps + 1))
    return (
        f"The {start.colour} ball is at {cell_name(start.cell)}, heading {start.heading}. "
        f"{path}. The answer is {question.answer}."
    )
