"""What a table is made of, and how its figures are written."""

from __future__ import annotations

from dataclasses import dataclass, field

from storm_vlm.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Cell:
    """A figure, and what has to be known about it, in smaller print."""

    text: str = "-"
    small: str = ""
    warning: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table; `paper` lines are not ours."""

    cells: tuple[Cell, ...]
    paper: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


def percent(value: float | None) -> str:
    """A share, without the sign."""
    return "-" if value is None else f"{100 * value:.1f}"


def signed(difference: Estimate) -> str:
    """A difference in points, with its interval."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def estimated(share: Estimate | None, small: str = "", warning: bool = False) -> Cell:
    """A mean with its interval."""
    if share is None:
        return Cell()
    text = f"{percent(share.mean)} [{percent(share.low)}, {percent(share.high)}]"
    return Cell(text, small, warning)
