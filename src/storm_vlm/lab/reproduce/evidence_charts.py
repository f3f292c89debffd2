"""The charts of the page that are not an analysis's."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from storm_vlm.charts import BLUE, GREY, ORANGE
from storm_vlm.lab.arms import ARMS


def dots(table: dict[str, Any]) -> Any:
    """Every arm's accuracy with its interval and its seeds, and with another clip's latents."""
    lines = [line for line in table["lines"] if line["accuracy"]]
    figure = Figure(figsize=(7, 0.9 + 0.42 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(lines):
        accuracy = line["accuracy"]
        colour = BLUE if line["tampered"] else GREY
        axes.plot([accuracy.low, accuracy.high], [place, place], color=colour, linewidth=2)
        axes.plot([accuracy.mean], [place], "o", color=colour, markersize=8)
        axes.plot(
            line["by_seed"], [place + 0.22] * len(line["by_seed"]), ".", color=colour, markersize=5
        )
        if line["tampered"]:
            axes.plot([line["tampered"]["swap_other_answer"].mean], [place], "x", color=ORANGE)
    axes.set(
        xlim=(0, 1),
        xlabel="accuracy",
        yticks=range(len(lines)),
        yticklabels=[line["name"] for line in lines],
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.margins(y=0.15)
    return figure


def rows_curve(table: dict[str, Any]) -> Any:
    """Accuracy against the share of the training rows, STORM and SFT."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("full", BLUE), ("sft", GREY)):
        lines = [
            line for line in table["lines"] if line["arm"].startswith(name) and line["accuracy"]
        ]
        lines.sort(key=lambda line: ARMS[line["arm"]].rows)
        at = [100 * ARMS[line["arm"]].rows for line in lines]
        shares = [line["accuracy"] for line in lines]
        axes.plot(at, [share.mean for share in shares], "o-", color=colour, label=ARMS[name].name)
        lows, highs = [share.low for share in shares], [share.high for share in shares]
        axes.fill_between(at, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axes.set(ylim=(0, 1), xscale="log", xlabel="training rows, percent of all", ylabel="accuracy")
    axes.set(xticks=[100 / 8, 100 / 3, 100], xticklabels=["12.5", "33", "100"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
