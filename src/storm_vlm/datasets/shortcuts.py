"""How far one comes with a question without what it asks for: measured on imported rows, beside chance."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from storm_vlm.data.row import Row


@dataclass(frozen=True)
class Asked:
    """What of a row the measurement needs."""

    question: str
    options: tuple[str, ...]
    answer: str
    guesses: dict[str, str]


@dataclass
class Shortcuts:
    """Accuracies of guessers by family of questions (`meta.family`).

    `text only` is the best of three: the option that is most often right where it is offered, the same among
    questions of the very words, and the most frequent place; each half of the rows is guessed with what is counted
    on the other. The others are what a row's maker put into `meta.shortcuts`: answers by simple rules from the first
    frame.
    """

    asked: dict[str, list[Asked]] = field(default_factory=lambda: defaultdict(list))

    def add(self, row: Row) -> None:
        if row.options and "shortcuts" in row.meta:
            guesses = row.meta["shortcuts"]
            self.asked[row.meta.get("family", "")].append(
                Asked(row.question, row.options, row.answer, guesses)
            )

    def accuracies(self) -> dict[str, tuple[int, dict[str, float]]]:
        """Rows of each family, and chance and every guesser's accuracy on them."""
        found: dict[str, tuple[int, dict[str, float]]] = {}
        for family, rows in self.asked.items():
            names = dict.fromkeys(name for row in rows for name in row.guesses)
            right = {
                name: sum(row.guesses.get(name) == row.answer for row in rows) for name in names
            }
            shares = {name: count / len(rows) for name, count in right.items()}
            chance = sum(1 / len(row.options) for row in rows) / len(rows)
            found[family] = (len(rows), {"chance": chance, "text only": _text_only(rows), **shares})
        return found


def _text_only(rows: list[Asked]) -> float:
    halves = rows[::2], rows[1::2]
    right = Counter[str]()
    for told, guessed in (halves, halves[::-1]):
        places = Counter(row.options.index(row.answer) for row in told)
        for name, words in (("option", False), ("question", True)):
            keys = [(row.question if words else "", row) for row in told]
            offered = Counter((key, option) for key, row in keys for option in row.options)
            answers = Counter((key, row.answer) for key, row in keys)
            for row in guessed:
                asked = [(row.question if words else "", option) for option in row.options]
                rates = [(answers[key] + 1) / (offered[key] + len(asked)) for key in asked]
                right[name] += row.options[rates.index(max(rates))] == row.answer
        for row in guessed:
            place = max(range(len(row.options)), key=lambda i: places[i])
            right["place"] += row.options[place] == row.answer
    return max(right.values()) / len(rows)
