"""The quickstart's report: one self-contained HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from storm_vlm.charts import svg
from storm_vlm.data.atomic_write import write_text
from storm_vlm.data.row import Row, read_rows
from storm_vlm.lab.arms import ARMS
from storm_vlm.pages import render

SHOWN = ("base", "sft", "pause", "stage1_only", "stage2_only", "full", "shipped")
ARM_NAMES = {arm: ARMS[arm].name for arm in SHOWN}
INTERVENTIONS = {
    "swap_other_answer": "another clip's latents fed into the slots (of another answer)",
    "shuffle": "its own latents, shuffled between slots",
    "zero": "zeros fed",
    "removed": "no slots at all",
}
EXAMPLES = 8


def write_report(
    folder: Path,
    summary: dict[str, Any],
    results: Sequence[dict[str, Any]],
    data: dict[str, Path],
) -> Path:
    """Write `report.html` into `folder`; clips play from the files beside it."""
    page = render(
        "report.html",
        summary=summary,
        arms=[(arm, name) for arm, name in ARM_NAMES.items() if summary.get(arm) is not None],
        interventions=INTERVENTIONS,
        names=ARM_NAMES,
        bars=svg(accuracy_bars(summary)),
        curves=svg(loss_curves(folder, results)),
        examples=_examples(folder, results, read_rows(data["test"])),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def accuracy_bars(summary: dict[str, Any]) -> Figure:
    """Accuracy of every arm with its interval, over lines for the best shortcut and for chance."""
    arms = [arm for arm in ARM_NAMES if summary.get(arm) is not None]
    values = [summary[arm] for arm in arms]
    lows, highs = zip(*(summary[f"{arm}_interval"] for arm in arms), strict=True)
    errors = [
        [max(0.0, v - low) for v, low in zip(values, lows, strict=True)],
        [max(0.0, high - v) for v, high in zip(values, highs, strict=True)],
    ]
    figure = Figure(figsize=(7, 0.5 + 0.45 * len(arms)), layout="constrained")
    axes = figure.subplots()
    colours = ["#2f6fdf" if arm in ("full", "shipped") else "#8a93a3" for arm in arms]
    axes.barh([ARM_NAMES[arm] for arm in arms], values, xerr=errors, color=colours, capsize=3)
    axes.axvline(summary["shortcut_best"], color="#c2410c", linestyle="--", label="best shortcut")
    axes.axvline(summary["chance"], color="#8a93a3", linestyle=":", label="chance")
    axes.set(xlim=(0, 1), xlabel="accuracy on questions about the unseen part")
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="upper right")  # where the bars of the baselines are short
    return figure


def loss_curves(runs: Path, results: Sequence[dict[str, Any]]) -> Figure:
    """Answer and alignment loss of each stage of each arm, whose checkpoints lie in `runs`."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    (left, right) = figure.subplots(1, 2)
    for result in results:
        offset, points, aligned = 0, [], []
        folder = runs / f"{result['arm']}-{result['seed']}"
        for history_file in sorted(folder.glob("*/log_history.json")):
            history = json.loads(history_file.read_text())
            steps = [entry for entry in history if "answer_loss" in entry]
            points += [(offset + e["step"], e["answer_loss"]) for e in steps]
            aligned += [
                (offset + e["step"], e["alignment_loss"]) for e in steps if "alignment_loss" in e
            ]
            offset += steps[-1]["step"] if steps else 0
        if points:
            left.plot(*zip(*points, strict=True), label=ARM_NAMES[result["arm"]])
        if aligned:
            right.plot(*zip(*aligned, strict=True), label=ARM_NAMES[result["arm"]])
    left.set(xlabel="optimizer step", ylabel="answer loss", yscale="log")
    right.set(xlabel="optimizer step", ylabel="alignment loss")
    left.legend(frameon=False)
    return figure


def _examples(
    folder: Path, results: Sequence[dict[str, Any]], rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """Test questions with every arm's answer: right and wrong ones as they come, in the order of the file."""
    said: dict[str, dict[str, Any]] = {}
    for result in results:
        for outcome in result["test"]:
            said.setdefault(outcome["id"], {})[result["arm"]] = outcome
    return [
        {
            "row": row,
            "clip": os.path.relpath(row.video, folder),
            "thought": os.path.relpath(row.thought_video.path, folder)
            if row.thought_video
            else None,
            "said": [
                (ARM_NAMES[arm], said[row.id][arm]) for arm in ARM_NAMES if arm in said[row.id]
            ],
        }
        for row in rows[:EXAMPLES]
    ]
