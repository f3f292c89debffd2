"""What all plots share: their colours, and a figure as a data URI for a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, GREY, ORANGE = "#2f6fdf", "#8a93a3", "#c2410c"
BLACK = "#000000"  # as matplotlib writes it: axes, letters
# Black follows the page: dark on light, and light on dark.
STYLE = (
    "<style>svg{color:#1c1c1c;fill:currentColor}"
    "@media(prefers-color-scheme:dark){svg{color:#e4e4e4}}</style>"
)


def svg(figure: Figure) -> str:
    """A figure as a data URI, see-through, with text as text. The caller's matplotlib backend stays as it is."""
    style: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "storm"}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue().replace(BLACK, "currentColor").replace("<defs>", f"{STYLE}<defs>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
