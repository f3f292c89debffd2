"""HTML pages from the templates that are shipped."""

from __future__ import annotations

from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A page, with everything escaped that is not the template's own; a value that is missing is an error.

    Filters for an estimate (`mean`, `low`, `high`): `share`, `range` and `points`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("storm_vlm"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"share": share, "range": interval, "points": points}
    return environment.get_template(template).render(**values)


def share(found: dict[str, Any]) -> str:
    """A mean from 0 to 1 in percent."""
    return "-" if found["mean"] is None else f"{100 * found['mean']:.1f}%"


def interval(found: dict[str, Any], scale: float = 100, digits: int = 1) -> str:
    """From its low to its high."""
    if found["mean"] is None:
        return ""
    return f"{scale * found['low']:.{digits}f} to {scale * found['high']:.{digits}f}"


def points(found: dict[str, Any]) -> str:
    """A difference of shares, in points."""
    return f"{100 * found['mean']:+.1f}"
