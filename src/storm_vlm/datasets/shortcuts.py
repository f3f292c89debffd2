"""How far one comes with a question without what it asks for: measured on imported rows, beside chance."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from storm_vlm.data.row import Row


@dataclass(frozen=True)
class Asked:
    """What of a row the measurement needs."""

    options: tuple[str, ...]
    answer: str
    guesses: dict[str, str]


@dataclass
class Shortcuts:
    """Accuracies of guessers by family of questions (`meta.family`).

    `text only` takes the option that is most often right where it is offered, or, if that is better, the most
    frequent place; each half of the rows is guessed with what is counted on the other. The others are what a row's
    maker put into `meta.shortcuts`: answers by simple rules from the first frame.
    """

    asked: dict[str, list[Asked]] = field(default_factory=lambda: defaultdict(list))

    def add(self, row: Row) -> None:
        if row.options and "shortcuts" in row.meta:
            guesses = row.meta["shortcuts"]
            self.asked[row.meta.get("family", "")].append(Asked(row.options, row.answer, guesses))

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
    by_text = by_place = 0
    for told, guessed in (halves, halves[::-1]):
        offered = Counter(option for row in told for option in row.options)
        right = Counter(row.answer for row in told)
        places = Counter(row.options.index(row.answer) for row in told)
        for row in guessed:
            rates = [(right[o] + 1) / (offered[o] + len(row.options)) for o in row.options]
            by_text += row.options[rates.index(max(rates))] == row.answer
            place = max(range(len(row.options)), key=lambda i: places[i])
            by_place += row.options[place] == row.answer
    return max(by_text, by_place) / len(rows)
