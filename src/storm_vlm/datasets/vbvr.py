"""VBVR's generated tasks as questions: what is seen is the first still, the thought video the rest of the same file.

Their prompts are orders to a video generator and sometimes give the answer away, their metadata always do, so
neither is asked with. Layouts: github.com/Video-Reason/VBVR-DataFactory (2ab7ac6), VBVR-Pro, VBVR-MultiStep, and the
tables of VBVR-Dataset; parameters: the generators named at each maker.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

from storm_vlm.data.video import frame_times
from storm_vlm.datasets.parse import Fields, Skipped
from storm_vlm.errors import InputError

FPS = 16.0  # of all generators; Pro's metadata have their own
FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
_TREE = re.compile(r"(?:[A-Z]|Multi)-\d+_(.+?)_data-generator|([^/]+)_task/")
SEEN = 1.5  # frames: the still stands for longer, and two frames are one temporal grid
OPTIONS = 4
POOL = 8  # that the wrong options are taken from, so that each is right as often as others
CLEAR = 8.0  # units of height (12 pixels) that another way to shelve the books must be worse by
AHEAD = 2  # rows that an answer may be more frequent than the rarest one that has occurred
IN_SIGHT = 1004  # pixels from the left; pictures are 1024 wide
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
COLOURS = {
    (255, 100, 100): "red",
    (100, 255, 100): "green",
    (100, 100, 255): "blue",
    (255, 255, 100): "yellow",
    (255, 100, 255): "magenta",
    (100, 255, 255): "cyan",
    (255, 150, 50): "orange",
    (150, 255, 50): "lime",
    (50, 150, 255): "sky blue",
    (200, 200, 200): "grey",
}  #: of G-174's circles


@dataclass(frozen=True)
class Candidate:
    """One of the questions that could be asked about a sample.

    ``kind`` is what should be asked for equally often; with ``kinds``, all there are, a question is left out rather
    than one kind be ahead. ``wrong``: at least one other option. ``guesses``: by
    rules that look at the first frame, each a ranking, of which the first that is offered is meant.
    """

    family: str
    text: str
    answer: str
    wrong: tuple[str, ...]
    kind: str
    steps: int
    guesses: dict[str, Sequence[str]] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    plan: str | None = None


class Vbvr:
    """Samples to rows; one for each import, because it balances answers and their places."""

    def __init__(self) -> None:
        self._asked: Counter[tuple[str, str]] = Counter()
        self._placed: Counter[tuple[str, int, int]] = Counter()
        self._due: Counter[tuple[str, str]] = Counter()  # how often an option was wrong too often
        self._seen: set[str] = set()

    def __call__(self, item: Fields) -> list[Fields]:
        sample = _sample(item)
        maker = next((make for name, make in MAKERS.items() if name in sample.task), None)
        if maker is None:
            raise Skipped(f"no questions about the task {sample.task}")
        if sample.id in self._seen:
            raise Skipped("the same sample again")
        families: dict[str, list[Candidate]] = {}
        try:
            for candidate in maker(sample.parameters):
                families.setdefault(candidate.family, []).append(candidate)
        except InputError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"parameters that {sample.task} is not known to have: {type(error).__name__}: {error}"
            ) from error
        self._seen.add(sample.id)
        chosen = [self._choose(candidates, sample) for candidates in families.values()]
        rows = [self._row(sample, candidate) for candidate in chosen if candidate]
        if not families:
            raise Skipped(
                f"{sample.task}: nothing in it is told apart well enough to be asked about"
            )
        if not rows:
            raise Skipped(f"{sample.task}: its answer is asked for often enough")
        return rows

    def _choose(self, candidates: list[Candidate], sample: Sample) -> Candidate | None:
        """The one whose kind is asked for least; which of several is chance, the same in every run."""
        best = min(
            candidates,
            key=lambda c: (self._asked[c.family, c.kind], _chance(sample.id, c.text, c.kind)),
        )
        counts = [count for kind in best.kinds if (count := self._asked[best.family, kind])]
        if counts and self._asked[best.family, best.kind] >= min(counts) + AHEAD:
            return None
        self._asked[best.family, best.kind] += 1
        return best

    def _row(self, sample: Sample, asked: Candidate) -> Fields:
        count = min(OPTIONS, 1 + len(asked.wrong))
        family = asked.family
        needed = sorted(asked.wrong, key=lambda option: self._due[family, option])[: count - 1]
        others = sorted(needed, key=lambda option: _chance(sample.id, asked.text, option))
        self._due[family, asked.answer] -= count - 1  # so an option is right one time in `count`
        self._due.update((family, option) for option in others)
        place = min(
            range(count),
            key=lambda i: (
                self._placed[asked.family, count, i],
                _chance(sample.id, asked.text, str(i)),
            ),
        )
        self._placed[asked.family, count, place] += 1
        options = [*others[:place], asked.answer, *others[place:]]
        return {
            "id": f"{sample.id}-{asked.family}",
            "video": sample.video,
            **sample.window(),
            "question": asked.text,
            "options": options,
            "answer": asked.answer,
            "plan": asked.plan,
            "meta": {
                "source": "VBVR",
                "task": sample.task,
                "family": asked.family,
                "steps": asked.steps,
                "shortcuts": {
                    rule: next((guess for guess in ranking if guess in options), "")
                    for rule, ranking in asked.guesses.items()
                },
                "prompt": sample.prompt,
            },
        }


@dataclass(frozen=True)
class Sample:
    """What of a sample of any layout matters. ``task``: without prefix and suffix of its repository."""

    id: str
    task: str
    video: str
    prompt: str | None
    parameters: Fields
    provenance: Fields
    fps: float

    def window(self) -> Fields:
        """Two frames are seen, by the file's own times if it lies there already; an empty one does not count.

        Raises InputError for a video of a still alone, and VideoError.
        """
        seen, end = 1 / self.fps, SEEN / self.fps
        if os.path.isabs(self.video) and os.path.isfile(self.video) and os.path.getsize(self.video):
            times = frame_times(self.video)
            if len(times) < 3:
                raise InputError(f"a video in which nothing follows the still: {self.video}")
            seen, end = times[1], (times[1] + times[2]) / 2
        thought = {"path": self.video, "start": end, "source": "oracle", "generator": self.task}
        thought |= {"provenance": self.provenance}
        return {"end": end, "keyframes": [seen], "thought_video": thought}


def _sample(item: Fields) -> Sample:
    """Of a folder (see `sources.py`), a line of VBVR-Dataset's table, or metadata that name their video.

    Raises Skipped and ``ValueError``.
    """
    metadata = item.get("metadata") or item.get("metadata_json")
    if metadata is None and "parameters" in item:
        metadata = item
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    if not metadata:
        raise Skipped("sample without metadata: nothing tells its answer")
    parameters = metadata.get("parameters") if isinstance(metadata, dict) else None
    if not isinstance(parameters, dict):
        raise InputError("metadata without parameters")
    if not (video := _video(item)):
        raise Skipped("sample without a video")
    generation = metadata.get("generation") or {}
    git, digest = generation.get("git") or {}, metadata.get("param_hash")
    name = metadata.get("task_id") or item.get("sample_id") or Path(video).parent.name
    tree = f"{item.get('folder')}/{video}"
    named = [
        metadata.get("generator"),
        item.get("generator"),
        *("".join(found) for found in _TREE.findall(tree)[::-1]),
    ]
    named += [metadata.get("task"), re.sub(r"_?\d+$", "", str(name)), "unknown"]
    task = _bare(next(text for text in named if text and isinstance(text, str)))
    provenance = {
        "repository": git.get("repo"),
        "commit": git.get("commit"),
        "seed": generation.get("seed"),
        "param_hash": digest,
        "index": next((int(n) for n in re.findall(r"(\d+)$", str(name))), None),
    }
    return Sample(
        id=f"vbvr-{task}-{digest or name}",
        task=task,
        video=video,
        prompt=item.get("prompt"),
        parameters=parameters,
        provenance={key: value for key, value in provenance.items() if value is not None},
        fps=float(parameters.get("video_fps") or FPS),
    )


def _video(item: Fields) -> str | None:
    """The file of that name, else the only video beside the metadata."""
    if "folder" not in item:
        named = (item.get(key) for key in ("ground_truth_video_path", "video_path", "video"))
        return next((name for name in named if isinstance(name, str) and name), None)
    files = [file for file in item["files"] if Path(file).stem == "ground_truth"]
    films = [file for file in item["files"] if file.lower().endswith(FILMS)]
    found = [file for file in files if file in films] or files or (films if not films[1:] else [])
    return str(Path(item["folder"], found[0])) if found else None


def _bare(name: str) -> str:
    return re.sub(r"^(?:[A-Z]|Multi)-\d+_|(?:_data-generator)?(?:_task)?$", "", name)


def _chance(*parts: str) -> bytes:
    return sha256("\0".join(parts).encode()).digest()


# ------------------------------------------------------------------------------------------ sliding puzzle (O-47)
Board = tuple[int, ...]  #: tiles by cell, row by row; 0 is the empty square
SEARCHED = 24  # moves; each costs twice the time and memory of the one before


def sliding_puzzle(parameters: Fields) -> Iterator[Candidate]:
    """Which tile makes the k-th move, and where the empty square is then; if there is one shortest way only."""
    size, tiles = int(parameters["size"]), parameters["objects"]
    boards: list[Board] = []
    for when in ("initial_position", "target_position"):
        cells = {(int(tile[when][0]), int(tile[when][1])): int(tile["value"]) for tile in tiles}
        boards.append(tuple(cells[divmod(i, size)] for i in range(size * size)))
    ways = shortest_ways(boards[0], boards[1], size)
    if not ways:
        raise Skipped(f"sliding puzzle: more than {SEARCHED} moves, or no way at all")
    if len(ways) > 1:
        raise Skipped("sliding puzzle: several ways are as short")
    (way,) = ways
    if len(way) != int(parameters.get("solution_length", len(way))):
        raise Skipped("sliding puzzle: its video makes more moves than it needs")
    board, blanks = boards[0], [boards[0].index(0)]
    for tile in way:
        blanks.append(board.index(tile))
        board = _moved(board, tile)
    intro = (
        "The tiles slide one at a time into the empty square until they are in order, row by row, with the empty "
        f"square at the bottom right. That takes exactly {len(way)} moves."
    )
    plan = "The tiles that slide, in order: " + ", ".join(map(str, way)) + "."
    home = {tile: _apart(cell, size * size - 1, size) for cell, tile in enumerate(boards[1])}
    start = boards[0]
    near = sorted(set(start) - {0}, key=lambda tile: _apart(start.index(tile), blanks[0], size))
    by_distance = sorted(range(size * size), key=lambda cell: _apart(cell, blanks[0], size))
    by_goal = sorted(range(size * size), key=lambda cell: -sum(divmod(cell, size)))
    for k in range(2, len(way)):  # the first is in sight, the last can be told from the goal
        answer = way[k - 1]
        # As far from the corner in the end as the answer: the question's numbers alone tell how far that is.
        wrong = sorted(set(near) - {answer}, key=lambda tile: abs(home[tile] - home[answer]))
        yield Candidate(
            family="sliding_move",
            text=f"{intro} Which tile makes move {k}?",
            answer=f"tile {answer}",
            wrong=tuple(f"tile {tile}" for tile in wrong[:OPTIONS]),
            kind=f"{size} {answer}",
            steps=k,
            guesses={"nearest to the empty square": [f"tile {tile}" for tile in near]},
            plan=plan,
        )
        cells = [
            cell
            for cell in sorted(range(size * size), key=lambda c: _apart(c, blanks[k], size))
            if cell != blanks[k] and _apart(cell, blanks[k], size) % 2 == 0
        ]
        yield Candidate(
            family="sliding_blank",
            text=f"{intro} Where is the empty square after move {k}?",
            answer=_cell(blanks[k], size),
            wrong=tuple(_cell(cell, size) for cell in cells[:POOL]),
            kind=f"{size} {blanks[k]}",
            steps=k,
            guesses={
                "nearest to where it is": [_cell(cell, size) for cell in by_distance],
                "nearest to the goal": [_cell(cell, size) for cell in by_goal],
            },
            plan=plan,
        )


def shortest_ways(
    start: Board, goal: Board, size: int, most: int = SEARCHED
) -> list[tuple[int, ...]]:
    """The shortest sequences of tiles from a board to another, two at most; searched from both ends."""
    ways: list[dict[Board, list[tuple[int, ...]]]] = [{start: [()]}, {goal: [()]}]
    seen: list[set[Board]] = [{start}, {goal}]
    for _ in range(most + 1):
        met = set(ways[0]) & set(ways[1])
        if met:
            joined = [a + b[::-1] for m in met for a in ways[0][m] for b in ways[1][m]]
            return joined[:2]
        side = 0 if len(ways[0]) <= len(ways[1]) else 1
        following: dict[Board, list[tuple[int, ...]]] = {}
        for board, moves in ways[side].items():
            for cell in _beside(board.index(0), size):
                after = _moved(board, board[cell])
                if after not in seen[side]:
                    known = following.setdefault(after, [])
                    known.extend((*move, board[cell]) for move in moves[: 2 - len(known)])
        seen[side] |= set(following)
        ways[side] = following
    return []


def _moved(board: Board, tile: int) -> Board:
    swap = {tile: 0, 0: tile}
    return tuple(swap.get(value, value) for value in board)


def _beside(cell: int, size: int) -> list[int]:
    row, column = divmod(cell, size)
    around = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return [r * size + c for r, c in around if 0 <= r < size and 0 <= c < size]


def _apart(a: int, b: int, size: int) -> int:
    return sum(abs(x - y) for x, y in zip(divmod(a, size), divmod(b, size), strict=True))


def _cell(cell: int, size: int) -> str:
    row, column = divmod(cell, size)
    return f"row {row + 1}, column {column + 1}"


# ------------------------------------------------------------------------------------------------- dominoes (O-24)
def dominoes(parameters: Fields) -> Iterator[Candidate]:
    """Which is the last to fall, among dominoes in sight; candidates differ in how many options are smaller."""
    pieces = sorted(parameters["objects"], key=lambda piece: piece["position"])
    xs, last = [float(piece["position"]) for piece in pieces], int(parameters["answer"])
    if [piece["index"] for piece in pieces if piece["is_fallen"]] != list(range(1, last + 1)):
        raise InputError("fallen dominoes do not end at the answer")
    visible = [n for n, x in enumerate(xs, 1) if x < IN_SIGHT]
    gaps = [b - a for a, b in pairwise(xs)]
    widest = str(1 + gaps.index(max(gaps)))
    for below in range(OPTIONS):
        first = last - below
        offered = [n for n in range(first, first + OPTIONS) if n in visible]
        if len(offered) == OPTIONS:
            yield Candidate(
                family="domino_last",
                text="The first domino on the left is pushed over. Counted from the left, which domino is the last "
                "to fall?",
                answer=str(last),
                wrong=tuple(str(n) for n in offered if n != last),
                kind=str(below),
                steps=last,
                guesses={"before the widest gap": [widest]},
            )


# ------------------------------------------------------------------------------------------------ bookshelf (O-30)
def bookshelf(parameters: Fields) -> Iterator[Candidate]:
    """Which waiting book fills the k-th gap, unless another way to shelve them fits nearly as well."""
    books = parameters["objects"]
    shelf = [(float(b["center"][0]), float(b["height"])) for b in books if b["type"] == "existing"]
    new = [b for b in books if b["type"] == "new"]
    waiting = sorted(new, key=lambda b: b["initial_center"][0])
    gaps = sorted(new, key=lambda b: b["final_center"][0])
    fitting = [_fitting(shelf, float(b["final_center"][0])) for b in gaps]

    def cost(order: Sequence[Fields]) -> float:
        pairs = zip(order, fitting, strict=True)
        return sum(abs(float(b["height"]) - height) for b, height in pairs)

    if len(gaps) > len(ORDINALS):
        raise Skipped("bookshelf: too many books to compare all orders")
    orders = [order for order in permutations(gaps) if list(order) != gaps]
    if min(map(cost, orders)) < cost(gaps) + CLEAR:
        raise Skipped("bookshelf: another way to shelve the books fits nearly as well")
    names = [f"the {ORDINALS[i]}" for i in range(len(new))]
    by_height = sorted(waiting, key=lambda b: b["height"])
    for k, book in enumerate(gaps):
        answer = names[waiting.index(book)]
        yield Candidate(
            family=f"bookshelf_{len(new)}",
            text="Each of the waiting books on the right goes into the gap whose neighbours are nearest to it in "
            f"height. Counted from the left, which waiting book fills the {ORDINALS[k]} gap from the left?",
            answer=answer,
            wrong=tuple(name for name in names if name != answer),
            kind=answer,
            steps=k + 1,
            guesses={
                "in the order they wait": [names[k]],
                "in the order of height": [names[waiting.index(by_height[k])]],
            },
        )


def _fitting(shelf: list[tuple[float, float]], x: float) -> float:
    """The mean height of a gap's neighbours."""
    left = max((book for book in shelf if book[0] < x), default=None)
    right = min((book for book in shelf if book[0] > x), default=None)
    heights = [book[1] for book in (left, right) if book]
    return sum(heights) / len(heights)


# ----------------------------------------------------------------------------------------------- dot to dot (O-34)
def dot_to_dot(parameters: Fields) -> Iterator[Candidate]:
    """How often the lines cross. Which dot is reached is not told: the more dots, the more crossings."""
    dots = sorted(parameters["objects"], key=lambda dot: dot["number"])
    points = [tuple(map(float, dot["center"])) for dot in dots]
    pairs = [
        (a, b)
        for (m, a), (n, b) in combinations(enumerate(pairwise(points)), 2)
        if n - m > 1  # neighbours meet in a dot
    ]
    kinds = ("0", "1", "2", "3 or more")
    answer = kinds[min(sum(_cross(*a, *b) for a, b in pairs), 3)]
    yield Candidate(
        family="dot_crossings",
        text="The dots are joined by straight lines in the order of their numbers. How many times do lines cross "
        "each other in the finished drawing?",
        answer=answer,
        wrong=tuple(kind for kind in kinds if kind != answer),
        kind=answer,
        steps=len(points) - 1,
        guesses={
            "no line crosses another": ["0"],
            "usual for so many dots": [kinds[min(round(0.23 * len(pairs)), 3)]],
        },
        kinds=kinds,
    )


def _cross(a: Any, b: Any, c: Any, d: Any) -> bool:
    """Whether the line from a to b and the one from c to d have a point in common."""

    def side(p: Any, q: Any, r: Any) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) <= 0 and side(c, d, a) * side(c, d, b) <= 0


# -------------------------------------------------------------------------------------------------- circles (G-174)
def circles(parameters: Fields) -> Iterator[Candidate]:
    """The colour of the i-th in the row from the largest to the smallest; only colours that one circle has."""
    row = sorted(parameters["circles"], key=lambda circle: circle["final_position"][0])
    sizes = [circle["radius"] for circle in row]
    if sizes != sorted(sizes, reverse=True) or len(set(sizes)) < len(sizes):
        raise InputError("circles are not lined up by size")
    names = [COLOURS.get(tuple(circle["color"])) for circle in row]
    single = [name for name in names if name and names.count(name) == 1]
    lying = sorted(range(len(row)), key=lambda i: row[i]["initial_position"][0])
    for i, name in enumerate(names):
        if name in single and len(single) > 1:
            there = names[lying[i]]
            wrong = sorted(set(single) - {name}, key=lambda o: (o != there, _chance(str(sizes), o)))
            yield Candidate(
                family="circle_order",
                text="The circles line up in a row, from the largest on the left to the smallest on the right. What "
                f"colour is the {ORDINALS[i]} circle from the left then?",
                answer=name,
                wrong=tuple(wrong[:POOL]),
                kind=name,
                steps=1,
                guesses={"as they lie": [there or ""]},
            )


# ------------------------------------------------------------------------------------------- symbol insert (O-59)
def symbol_insert(parameters: Fields) -> Iterator[Candidate]:
    """Which symbol stands behind the inserted one, at position i; only symbols that occur once."""
    after = sorted(parameters["objects"], key=lambda thing: thing["slot_index"])
    labels = [f"{thing['color_name']} {thing['symbol_char']}" for thing in after]
    inserted = int(parameters["insert_position"])
    before = labels[:inserted] + labels[inserted + 1 :]
    for i in range(inserted + 1, len(labels)):
        if labels.count(labels[i]) > 1:
            continue
        stood = before[i] if i < len(before) else ""
        near = sorted(set(labels) - {labels[i]}, key=lambda o: abs(labels.index(o) - i))
        wrong = list(dict.fromkeys(o for o in [stood, *near] if o and o != labels[i]))
        yield Candidate(
            family="symbol_after",
            text=f"The symbol in the corner is inserted at position {inserted + 1}; those from there on move up by "
            f"one. Which symbol stands at position {i + 1} then?",
            answer=labels[i],
            wrong=tuple(wrong[: OPTIONS - 1]),
            kind=str(i - inserted),
            steps=1,
            guesses={"as they stand": [stood]},
        )


MAKERS: dict[str, Callable[[Fields], Iterator[Candidate]]] = {
    "sliding_puzzle": sliding_puzzle,
    "domino_chain_gap": dominoes,
    "bookshelf": bookshelf,
    "dot_to_dot": dot_to_dot,
    "arrange_circles": circles,
    "symbol_insert": symbol_insert,
}
