"""Stretches of time in text, and how far two of them overlap."""

from __future__ import annotations

import re
from collections.abc import Sequence

Moment = Sequence[float]  #: start and end, seconds
RIGHT = 0.5  # IoU from which on a moment counts as found, so that an accuracy is R@0.5

_TIME = r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)"
_UNIT = r"\s*(?:s|secs?|seconds?)?\s*"
_RANGE = re.compile(rf"{_TIME}{_UNIT}(?:[-~\u2013\u2014]|to|until|and)\s*{_TIME}", re.IGNORECASE)


def parse_moment(text: str) -> Moment | None:
    """The first stretch that a text names: "4.5 - 7", "from 4.5 s to 7 s", "0:04 to 0:07"; None: none."""
    if match := _RANGE.search(text):
        start, end = _seconds(*match.groups()[:3]), _seconds(*match.groups()[3:])
    elif len(times := [_seconds(*parts) for parts in re.findall(_TIME, text)]) == 2:
        start, end = times  # "starts at 4.5, ends at 7"
    else:
        return None
    return (start, end) if start <= end else None


def overlap(a: Moment, b: Moment) -> float:
    """Intersection over union (IoU); 0 where both are empty."""
    union = max(a[1], b[1]) - min(a[0], b[0])
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) / union if union > 0 else 0.0


def _seconds(hours: str | None, minutes: str | None, seconds: str) -> float:
    return 3600 * float(hours or 0) + 60 * float(minutes or 0) + float(seconds)
