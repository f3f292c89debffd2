"""The whole method in one sitting: clips, thought videos, Stage I, Stage II, the baseline, a report."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from storm_vlm.data.atomic_write import write_json
from storm_vlm.lab.experiment import Size, build_data, run_arms, summarize
from storm_vlm.lab.report import write_report

ARMS = ("base", "sft", "full", "shipped")
# A quarter of an hour is less than a step of the chain needs to be learned well; so the shipped model,
# trained for longer, answers the same questions.
SIZE = Size(train_rows=2000, test_rows=400, ood_rows=200, steps=1000)


def quickstart(folder: Path, console: Console, size: Size = SIZE) -> None:
    """Run it; what an earlier call finished in the same folder is not done again."""
    began = time.perf_counter()
    console.print(f"Micro world in [bold]{folder}[/bold]; interrupt and call again as you like.")
    results = run_arms(folder, folder / "outcomes", ARMS, [0], size, jobs=1)
    data = build_data(folder / "data", size)
    summary = summarize(results, data, "storm quickstart")
    summary["seconds"] = round(time.perf_counter() - began, 1)
    write_json(folder / "results.json", summary)
    report = write_report(folder, summary, results, data)
    checkpoint = folder / next(r["checkpoint"] for r in results if r["arm"] == "full")
    clip = next((folder / "data" / "clips").glob("reasoning-test-*.mp4"))
    console.print(
        f"STORM {summary['full']:.1%}, SFT {summary['sft']:.1%}, best shortcut {summary['shortcut_best']:.1%} "
        f"({summary['n_test']} questions, one seed)\n"
        f"The shipped STORM, seed 0 of storm reproduce: {summary['shipped']:.1%}; with another clip's latents "
        f"{summary['shipped_swap_other_answer']:.1%}\n"
        f"Report: [bold]{report}[/bold]\nAsk it yourself:\n"
        f'  storm answer {clip} "Where will the ball be after 5 more steps?" --checkpoint {checkpoint} --json',
        soft_wrap=True,
        highlight=False,
    )
