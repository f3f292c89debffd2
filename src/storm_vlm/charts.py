"""What all plots share: their colours, and a figure as a data URI for a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, GREY, ORANGE = "#2f6fdf", "#8a93a3", "#c2410c"


def svg(figure: Figure) -> str:
    """A figure as a data URI, with text as text. The caller's matplotlib backend stays as it is."""
    style: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "storm"}
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
