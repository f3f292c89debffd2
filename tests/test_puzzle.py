"""The second world: its rules against an independent restatement, and what makes it a fair test."""

import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from storm_vlm.data.row import read_rows
from storm_vlm.errors import InputError
from storm_vlm.lab.arms import STUDIES
from storm_vlm.lab.world.clips import build_world
from storm_vlm.lab.world.puzzle import SHARES, draw_scenes, plan, sample_puzzle, shortcuts
from storm_vlm.lab.world.questions import answers
from storm_vlm.lab.world.render import CELL, DARK, clip_frames, thought_frames
from storm_vlm.lab.world.simulator import SIZE, cell_name

COUNT = 400  # as `storm reproduce` tests on


@pytest.fixture(scope="module")
def asked() -> dict[str, list]:
    return {
        split: [
            (puzzle, question) for puzzle, (question,) in draw_scenes("reasoning", split, COUNT, 0)
        ]  # type: ignore[arg-type]
        for split in ("test", "ood")
    }


def restated(
    grid: list[str], at: int, velocity: complex, steps: int
) -> list[tuple[int, list[str]]]:
    """The rules again, as swaps in a list: what is at `at` is the ball, and goes along x + iy, y downwards."""
    shown = [(at, list(grid))]
    for _ in range(steps):
        x, y = at % SIZE + velocity.real, at // SIZE + velocity.imag
        if min(x, y) < 0 or max(x, y) >= SIZE:
            velocity *= 1j
        else:
            to = int(x + SIZE * y)
            velocity *= {"block": 1j, "pad": -1j}.get(grid[to].split()[-1], 1)
            grid[at], grid[to], at = grid[to], grid[at], to
        shown.append((at, list(grid)))
    return shown


def test_boards_follow_the_rules_and_answers_follow_the_boards(asked: dict[str, list]) -> None:
    velocities = {"right": 1, "left": -1, "down": 1j, "up": -1j}
    cells = [(row, column) for row in range(SIZE) for column in range(SIZE)]
    for puzzle, question in (*asked["test"], *asked["ood"]):
        first = puzzle.tracks[0][0]
        grid = [puzzle.tiles[c].name if c in puzzle.tiles else "nothing" for c in cells]
        at = cells.index(first.cell)
        grid[at] = "ball"
        expected = restated(grid, at, velocities[first.heading], len(puzzle.boards) - 1)
        for index, (at, lies) in enumerate(expected):
            assert puzzle.tracks[0][index].cell == cells[at]
            names = {cells[i]: n for i, n in enumerate(lies) if n not in ("nothing", "ball")}
            assert {cell: tile.name for cell, tile in puzzle.board(index).items()} == names
        at, lies = expected[puzzle.now + question.steps]
        answer = cell_name(cells[at])
        if question.family == "lies":
            answer = next(
                n for c, n in zip(cells, lies, strict=True) if f" {cell_name(c)} " in question.text
            )
        assert question.answer == answer
        assert plan(puzzle, question).endswith(f"The answer is {answer}.")
        assert f"step {question.steps}:" in plan(puzzle, question)


def test_shortcuts_fail_and_answers_are_balanced(asked: dict[str, list]) -> None:
    for split in ("test", "ood"):
        right: defaultdict[str, list[bool]] = defaultdict(list)
        for puzzle, question in asked[split]:
            for way, answer in shortcuts(puzzle, question).items():
                right[way].append(answer == question.answer)
        best = max(sum(hits) / COUNT for hits in right.values())
        assert best < 0.3
        if split == "test":
            assert f"more than {np.ceil(100 * best):.0f}%" in STUDIES["second_world"].paragraph
        for family, share in SHARES.items():
            counts = Counter(q.answer for _, q in asked[split] if q.family == family)
            assert sum(counts.values()) == share * COUNT and set(counts) <= set(answers(family))
            assert max(counts.values()) < 1.6 * share * COUNT / len(answers(family))


def test_what_is_guessed_from_the_neighbours_is_not_better(asked: dict[str, list]) -> None:
    """A piece beside the cell asked about, drawn at random, is the answer to a quarter of the questions."""
    shares = []
    for puzzle, question in asked["test"]:
        if question.cell:
            row, column = question.cell
            beside = ((row, column + 1), (row + 1, column), (row, column - 1), (row - 1, column))
            board = puzzle.board(puzzle.now)
            names = [board[cell].name for cell in beside if cell in board]
            shares.append(names.count(question.answer) / len(names))
    assert 0.15 < np.mean(shares) < 0.3


def test_the_clip_shows_a_board_at_rest_and_the_thought_video_what_changes() -> None:
    puzzle, (question,) = next(
        (p, q) for p, q in draw_scenes("reasoning", "test", 20, 0) if q[0].family == "lies"
    )
    clip = clip_frames(puzzle)
    away = np.ones((SIZE, SIZE), bool)
    for ball in puzzle.tracks[0][: puzzle.shown_steps]:
        away[ball.cell] = False
    still = np.kron(away, np.ones((CELL, CELL), bool))
    assert (clip[:, still] == clip[0, still]).all()
    assert question.cell is not None
    frames = thought_frames(puzzle, question.steps, 8, 0, [question.cell])
    for k in range(8):
        n = min(k, question.steps)
        lit = (frames[2 * k + 1] != DARK).any(-1).reshape(SIZE, CELL, SIZE, CELL).any((1, 3))
        shown = {puzzle.after(n).cell, puzzle.tracks[0][puzzle.now + n - 1].cell, question.cell}
        assert {(int(r), int(c)) for r, c in np.argwhere(lit)} == shown


def test_puzzles_are_written_beside_the_mirrors(tmp_path: Path) -> None:
    mirrors = build_world(tmp_path, "reasoning", "test", 3)
    rows = read_rows(build_world(tmp_path, "reasoning", "test", 3, world="puzzle"))
    assert mirrors.exists() and {row.meta["family"] for row in rows} <= set(SHARES)
    assert all(Path(row.thought_video.path).exists() for row in rows if row.thought_video)
    seen = read_rows(build_world(tmp_path, "perception", "test", 2, world="puzzle"))
    assert {"position", "tile", "board"} <= {row.meta["family"] for row in seen}
    with pytest.raises(InputError, match="continued"):
        build_world(tmp_path, "reasoning", "test", 3, continued=True, world="puzzle")
    with pytest.raises(InputError, match="one reasoning question"):
        build_world(tmp_path, "reasoning", "test", 3, questions=2, world="puzzle")
    with pytest.raises(InputError, match="grounding"):
        build_world(tmp_path, "grounding", "test", 3, world="puzzle")


def test_every_puzzle_has_all_pieces() -> None:
    for seed in range(50):
        puzzle = sample_puzzle(random.Random(seed))
        assert all(
            Counter(t.name for t in board.values())
            == Counter(t.name for t in puzzle.tiles.values())
            and len(board) == 8
            for board in puzzle.boards
        )
