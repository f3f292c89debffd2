"""The micro experiment and the quickstart, in small."""

import json
import re
from pathlib import Path

from rich.console import Console

from storm_vlm.world.experiment import ARMS, Size, run_arm
from storm_vlm.world.quickstart import quickstart

TINY = Size(train_rows=8, test_rows=6, ood_rows=4, steps=2)


def test_quickstart_writes_a_report_and_resumes(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    quickstart(tmp_path, console, TINY)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert {"sft", "full", "base", "full_swapped_latents", "full_minus_sft", "chance"} <= set(
        summary
    )
    assert summary["n_test"] == TINY.test_rows and set(summary["shortcuts"]) >= {
        "majority",
        "text_only",
    }
    page = (tmp_path / "report.html").read_text()
    for source in re.findall(r'<video src="([^"]+)"', page):
        assert (tmp_path / source).exists()
    assert not re.search(r'(src|href)="https?:', page)  # no request leaves the page
    assert "storm answer" in console.export_text()
    weights = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert weights
    (tmp_path / "report.html").unlink()
    quickstart(tmp_path, console, TINY)
    assert (tmp_path / "report.html").exists()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == weights


def test_every_arm_takes_the_same_number_of_steps() -> None:
    assert all(
        sum(stage.share for stage in stages) == 1 for arm, stages in ARMS.items() if arm != "base"
    )


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Stage I is done, Stage II is not: only Stage II is trained again."""
    from storm_vlm.world.experiment import build_data

    data = build_data(tmp_path / "data", TINY)
    first = run_arm(tmp_path, data, "full", 0, TINY)
    folder = tmp_path / "full-0"
    stage1 = (folder / "0-stage1" / "model.safetensors").stat().st_mtime_ns
    (folder / "result.json").unlink()
    (folder / "1-stage2" / "versions.json").unlink()
    stage2 = (folder / "1-stage2" / "model.safetensors").stat().st_mtime_ns
    again = run_arm(tmp_path, data, "full", 0, TINY)
    assert again == first
    assert (folder / "0-stage1" / "model.safetensors").stat().st_mtime_ns == stage1
    assert (folder / "1-stage2" / "model.safetensors").stat().st_mtime_ns != stage2
