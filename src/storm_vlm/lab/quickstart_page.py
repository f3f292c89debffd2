"""The quickstart's page: the evaluation's tables of what was just trained, the losses, and some questions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from storm_vlm.charts import BLUE, GREY, svg
from storm_vlm.data.atomic_write import write_text
from storm_vlm.data.row import Row, read_rows
from storm_vlm.evaluation.report import READING
from storm_vlm.evaluation.result_tables import build_tables, measure
from storm_vlm.evaluation.run_folder import Run, read_run
from storm_vlm.evaluation.summary import summarize
from storm_vlm.pages import render

EXAMPLES = 8
SYSTEMS = {"SFT": ("sft",), "STORM": ("stage1", "storm")}  # folders of their stages


def write_page(folder: Path, test: Path, spent: str) -> tuple[Path, str]:
    """Write `report.html` into `folder`; returns its path, and the result in a sentence."""
    runs = {name: read_run(folder / "answers" / stages[-1]) for name, stages in SYSTEMS.items()}
    sentence = result(runs, spent)
    page = render(
        "quickstart.html",
        sentence=sentence,
        reading=READING,
        tables=build_tables(measure(list(runs.values()))),
        runs=runs.values(),
        curves=svg(loss_curves(folder)),
        examples=examples(folder, runs, read_rows(test)[:EXAMPLES]),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html", sentence


def result(runs: dict[str, Run], spent: str) -> str:
    """What this machine showed."""
    right = {name: summarize(run).accuracy.mean for name, run in runs.items()}
    reliance = runs["STORM"].reliance
    swapped = reliance and reliance.interventions["swap_other_answer"].accuracy
    return (
        f"Of {len(runs['STORM'].records)} questions about what the clips do not show, STORM answers "
        f"{right['STORM']:.1%}, SFT on the same rows for as many steps {right['SFT']:.1%}"
        + (f", and STORM with another clip's latents {swapped.mean:.1%}" if swapped else "")
        + f". This machine took {spent}."
    )


def loss_curves(folder: Path) -> Figure:
    """Answer and alignment loss of each system, its stages one after the other."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    losses = ("answer_loss", "alignment_loss")
    axes: dict[str, Any] = dict(zip(losses, figure.subplots(1, 2), strict=True))
    for name, colour in (("STORM", BLUE), ("SFT", GREY)):
        points: dict[str, list[tuple[int, float]]] = {loss: [] for loss in axes}
        begun = 0
        for stage in SYSTEMS[name]:
            log = json.loads((folder / stage / "log_history.json").read_text())
            for loss, line in points.items():
                line += [(begun + entry["step"], entry[loss]) for entry in log if loss in entry]
            begun += max((entry["step"] for entry in log), default=0)
        for loss, line in points.items():
            if line:
                axes[loss].plot(*zip(*line, strict=True), color=colour, label=name)
    for loss, part in axes.items():
        part.set(xlabel="optimizer step", ylabel=loss.replace("_", " "), yscale="log")
        part.spines[["top", "right"]].set_visible(False)
    axes["answer_loss"].legend(frameon=False)
    return figure


def examples(folder: Path, runs: dict[str, Run], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row with its clips, as seen from `folder`, and every system's record of it."""
    records = {name: {record.id: record for record in run.records} for name, run in runs.items()}
    return [
        {
            "row": row,
            "clip": os.path.relpath(row.video, folder),
            "thought": row.thought_video and os.path.relpath(row.thought_video.path, folder),
            "answers": [(name, by_id[row.id]) for name, by_id in records.items()],
        }
        for row in rows
    ]
