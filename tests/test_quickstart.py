"""`storm quickstart`, in small: real processes side by side, a page, and going on after an end."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from storm_vlm.errors import StormError
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.quickstart import QuickstartSize, Task, quickstart, run_side_by_side
from storm_vlm.model.modeling import StormForConditionalGeneration

TINY = QuickstartSize(train_rows=8, test_rows=6, stage1_steps=2, stage2_steps=1)


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_it_trains_both_and_shows_what_these_models_do(tmp_path: Path) -> None:
    folder = tmp_path / "a b: c #1"  # a path that YAML would read otherwise
    console = silent()
    quickstart(folder, console, TINY)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "STORM: done" in text and f"--checkpoint {folder / 'storm'}" in text
    page = (folder / "report.html").read_text()
    answers = {
        name: json.loads((folder / "answers" / name / "run.json").read_text())
        for name in ("sft", "storm")
    }
    for run in answers.values():
        assert (
            f"{run['summary']['accuracy']['mean']:.1%}" in page
            and run["n_expected"] == TINY.test_rows
        )
    fed = json.loads((folder / "answers/storm/reliance.json").read_text())["interventions"]
    assert f"latents {fed['swap_other_answer']['accuracy']['mean']:.1%}" in page
    for source in re.findall(r'<video src="([^"]+)"', page):
        assert (folder / source.replace("%20", " ")).exists()
    assert not re.search(r'(src|href)="https?:', page)  # no request leaves the page
    assert {"sft", "stage1", "storm"} <= {
        path.parent.name for path in folder.rglob("model.safetensors")
    }


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_one_thread_each_and_a_failure_names_its_log(tmp_path: Path) -> None:
    one_thread = "import os; assert os.environ['OMP_NUM_THREADS'] == '1'"
    sleeps = Task("sleeps", python("import time; time.sleep(60)"))
    fails = [Task("begins", python(one_thread)), Task("fails", python("raise SystemExit(3)"))]
    began = time.monotonic()
    with pytest.raises(StormError, match=rf"B, fails: .* 3: see {tmp_path}/b\.log"):
        run_side_by_side({"A": [sleeps], "B": fails}, tmp_path, silent())
    assert time.monotonic() - began < 20  # A was ended, too


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_within_seconds(tmp_path: Path, number: int) -> None:
    """Even a process that hears of nothing; the signal goes to the parent alone."""
    deaf = (
        "import os, pathlib, signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; "
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(60)"
    )
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from storm_vlm.lab.quickstart import Task, run_side_by_side; "
        "from storm_vlm.cli.main import listen; listen()\n"
        f"tasks = [Task('waits', (sys.executable, '-c', {deaf!r}))]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "run_side_by_side({'A': tasks, 'B': tasks}, folder, Console())"
    )
    # A run in the background ignores Ctrl-C, and what it starts does, too.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    parent = subprocess.Popen(python(code), stderr=subprocess.PIPE, preexec_fn=heard)
    while len(children := [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    parent.send_signal(number)
    until = time.monotonic() + 15  # 5 on a quiet machine
    while any(map(alive, children)):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert parent.wait(60) != 0


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_small_model_runs_on_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        StormForConditionalGeneration.from_pretrained(str(shipped("storm")))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
