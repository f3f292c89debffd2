"""HTML pages from the templates that are shipped."""

from __future__ import annotations

from typing import Any, Protocol

import jinja2


class Estimate(Protocol):
    """A mean and its interval, as `evaluation.statistics` makes them; None: not measured."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def render(template: str, **values: Any) -> str:
    """A page, with everything escaped that is not the template's own; a value that is missing is an error.

    Filters for an estimate: `share`, `range` and `points`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("storm_vlm"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"share": share, "range": interval, "points": points}
    return environment.get_template(template).render(**values)


def share(estimate: Estimate | None) -> str:
    """A mean from 0 to 1 in percent."""
    return "-" if estimate is None else f"{100 * estimate.mean:.1f}%"


def interval(estimate: Estimate | None, scale: float = 100, digits: int = 1) -> str:
    """From its low to its high."""
    if estimate is None:
        return ""
    return f"{scale * estimate.low:.{digits}f} to {scale * estimate.high:.{digits}f}"


def points(estimate: Estimate) -> str:
    """A difference of shares, in points."""
    return f"{100 * estimate.mean:+.1f}"
