"""The command line as people type it: help, typos, ranges, names from registries, errors, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import run_storm
from rich.table import Table
from rich.text import Text

from storm_vlm.cli import main as command
from storm_vlm.cli.terminal import Terminal, show
from storm_vlm.errors import StormError
from storm_vlm.inference.reasoners import REASONERS
from storm_vlm.lab.checkpoints import shipped

VERBS = [
    *("answer", "doctor", "quickstart"),
    *("build", "export", "gallery", "import", "leaks"),
    *("plan", "train"),
    *("compare", "download", "evaluate", "judge", "lmms-task", "report", "validate"),
    *("bench", "pretrain", "reproduce", "world"),
]
PARTS = {
    "bench": ("train", "infer", "scale"),
    "build": ("run", "keyframes", "plans", "prompts", "thoughts", "filter", "collect"),
}
ROWS = ["--source", "a.jsonl", "--out", "b"]


@pytest.mark.parametrize(
    "verb",
    [[], *([verb] for verb in VERBS), *([verb, part] for verb in PARTS for part in PARTS[verb])],
)
def test_every_verb_has_help_for_every_option(verb: list[str]) -> None:
    result = run_storm(*verb, "--help")
    assert result.exit_code == 0 and not result.stderr
    options = [line.strip("│* ") for line in result.stdout.splitlines() if line.startswith("│")]
    bare = [line for line in options if line.startswith("--") and len(line.split()) <= 2]
    assert not [line for line in bare if not line.startswith(("--no-", "--empty-"))]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom storm_vlm.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'matplotlib', 'av'} & set(sys.modules), file=sys.stderr)"
    )
    for verb in VERBS:
        done = subprocess.run(
            [sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True
        )
        assert done.stderr.strip() == "set()", verb


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute"], 'Did you mean "evaluate"'),
        (["evaluate", "x", "y", "--batchsize", "3"], "Did you mean --batch-size"),
        (["evaluate", "x", "y", "--reasoner", "latnt"], ", ".join(REASONERS)),
        (["build", "--source", "a"], "--out"),
        (["answer", "clip.mp4"], "QUESTION"),
        (["world", "x", "--count", "0"], "--count"),
        (["world", "x", "--count", "-1"], "--count"),
        (["world", "x", "--count", "nan"], "--count"),
        (["world", "x", "--seed", "-1"], "--seed"),
        (["plan", "--tflops", "-5"], "--tflops"),
        (["plan", "--tflops", "nan"], "--tflops"),
        (["plan", "--num-frames", "0", "--width", "-1"], "--num-frames: .*; --width: "),
        (["evaluate", "x", "y", "--max-errors", "-1"], "--max-errors"),
        (["evaluate", "x", "y", "--max-errors", "nan"], "--max-errors"),
        (["evaluate", "x", "y", "--limit", "0"], "--limit"),
        (["build", *ROWS, "--max-cost", "0"], "--max-cost: .*greater than 0"),
        (["build", *ROWS, "--max-cost", "nan"], "--max-cost: .*finite"),
        (["build", *ROWS, "--price-in", "-1"], "--price-in: "),
        (["build", "plans", *ROWS, "--workers", "0"], "--workers"),
        (["evaluate", "x", "y", "--limit", "[red]5[/red]"], r"\[red\]5\[/red\]"),
        (["bench", "train", "--batch", "0"], "--batch"),
        (["validate", "x", "y", "--out", "z", "--limit", "1"], "--limit"),
        (["gallery", "x", "--limit", "0"], "--limit"),
        (["gallery", "x", "y", "z"], "too many arguments: y z"),
        (["leaks", "x", "y", "--num-frames", "-1"], "--num-frames"),
        (["reproduce", "--steps", "4"], "--steps"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run_storm(*arguments)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("storm: ") and result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", *ROWS, "--max-cost", "3"], "max_cost needs prices"),
        (["build", *ROWS, "teacher.modle=3"], "did you mean 'model'"),
        (["build", *ROWS, "--config", "absent.yaml"], "there is no config absent.yaml"),
        (["train", "absent.yaml"], "there is no config absent.yaml"),
        (["train", "stage1", "model.foo=1"], "so model.foo cannot be set"),
        (
            ["evaluate", "x", "y", "--base-url", "http://z/v1", "--latent-mode", "force"],
            "--latent-mode does nothing",
        ),
        (
            ["evaluate", "x", "y", "--base-url", "http://z/v1", "--max-pixels", "9"],
            "--max-pixels does nothing",
        ),
        (
            ["evaluate", "x", "y", "--base-url", "http://z/v1", "--reliance-rows", "9"],
            "--reliance-rows does nothing",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_storm(*arguments)
    assert (result.exit_code, result.stdout) == (1, "") and message in result.stderr
    assert result.stderr.startswith("storm: ") and result.stderr.count("\n") == 1


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setattr(os, "_exit", sys.exit)  # other tests may have left threads
    result = run_storm()
    return result.exit_code, result.stderr


def test_errors_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/data/[red]clips[/red]/" + "long/" * 40 + "\x1b[31mclip.mp4"
    code, told = failing(StormError(f"no video {path}"), monkeypatch)
    assert code == 1 and told == f"storm: no video {path}\n".replace(
        "\x1b", "\N{REPLACEMENT CHARACTER}"
    )
    code, told = failing(FileNotFoundError(2, "No such file", "x.txt"), monkeypatch)
    assert (code, told) == (1, "storm: x.txt: no such file\n")
    assert failing(KeyboardInterrupt(), monkeypatch) == (130, "storm: interrupted\n")
    assert failing(OSError("no hub\nno net"), monkeypatch) == (1, "storm: no hub no net\n")
    for bug in (ValueError("oops"), KeyError("oops")):
        code, told = failing(bug, monkeypatch)
        assert code == 1 and "Traceback" in told and str(bug) in told
        assert "report it" in told.splitlines()[-1] and "torch 2" in told.splitlines()[-1]


def test_ctrl_c_ends_a_process_in_one_line(tmp_path: Path) -> None:
    verb = [sys.executable, "-m", "storm_vlm", "world", str(tmp_path / "w"), "--count", "5000"]
    running = subprocess.Popen(
        verb,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # a test run in the background may have been told to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type]
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob("w/**/*.mp4")) and time.monotonic() < until:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130
    assert told.splitlines()[-1].endswith("storm: interrupted") and "Traceback" not in told


def test_a_bare_installation_says_which_extra_is_missing(tmp_path: Path) -> None:
    """matplotlib, timm and tensorboard are no dependencies: what does not use them works without."""
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'matplotlib.figure', 'timm', 'tensorboard', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import storm_vlm.training.train, storm_vlm.evaluation.runner, storm_vlm.analysis.reliance\n"
        "import storm_vlm.inference.pipeline, storm_vlm.construction.build\n"
        "from storm_vlm.cli.main import main\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "validate", "nope", "rows.jsonl", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "storm-vlm[analysis]" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_control_character_of_a_name_or_a_cell_reaches_the_terminal() -> None:
    nasty = "a\x1b[31m\x9b2J\x07\u202e.mp4"
    table = Table("name")
    table.add_row(Text(nasty, "bold"))
    for terminal in (
        Terminal(file=io.StringIO()),
        Terminal(file=io.StringIO(), force_terminal=True),
    ):
        show(nasty, to=terminal)
        terminal.print(table)
        terminal.print_json(data={nasty: nasty})
        terminal.print(nasty)
        written = re.sub(r"\x1b\[[0-9;]*m", "", terminal.file.getvalue().replace("\x1b[31m", "!"))
        assert not set(written) & set("!\x1b\x9b\x07\u202e") and "a" in written


def test_messages_are_no_part_of_a_progress_bars_line() -> None:
    code = """
import logging, storm_vlm.cli.main as m
from tqdm.auto import tqdm
from storm_vlm.errors import StormError
def verb(*_, **__):
    for i in tqdm(range(3), "rows", delay=0):
        logging.getLogger("storm_vlm.x").info("chosen\x1b[2J")
        if i: raise StormError("no such row")
m.app = verb
m.main([])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [line.split("\r")[-1] for line in done.stderr.splitlines()]
    assert done.returncode == 1 and lines[-1] == "storm: no such row"
    assert lines.count("chosen\N{REPLACEMENT CHARACTER}[2J") == 2  # each once


def test_a_short_training_says_nothing_but_what_it_does(
    reasoning_file: Path, tmp_path: Path
) -> None:
    arguments = [f"model={shipped('storm')}", f"data={reasoning_file}", f"output_dir={tmp_path}/o"]
    arguments += ["training.max_steps=2", "training.save_steps=1", "training.save_total_limit=1"]
    arguments += ["lora.r=2", "training.report_to=none", "training.disable_tqdm=true"]
    arguments += ["training.gradient_checkpointing=true", "training.per_device_train_batch_size=1"]
    arguments += ["training.gradient_checkpointing_kwargs={use_reentrant: false}"]
    (tmp_path / "mine.yaml").write_text("num_frames: 8\n")
    command = [sys.executable, "-m", "storm_vlm", "train", tmp_path / "mine.yaml", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.strip() and "targets:" not in line]
    assert done.returncode == 0 and [line[:11] for line in lines] == ["attention: "], done.stderr
    assert [file.name for file in (tmp_path / "o").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("verb", ["evaluate", "validate"])
def test_rows_are_looked_at_before_the_model_is_loaded(verb: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    for rows, message in (("absent.jsonl", "absent.jsonl"), ("rows.jsonl", "rows.jsonl:1: id: ")):
        result = run_storm(verb, "no/checkpoint/here", tmp_path / rows, "--out", tmp_path / "out")
        assert result.exit_code == 1 and message in result.stderr
    assert not [file for file in (tmp_path / "out").glob("*") if file.name != ".lock"]


@pytest.mark.parametrize(
    "override",
    [
        *("training.max_steps=abc", "training.max_steps=", "training.max_steps=[1"),
        *("training.gradient_accumulation_steps=0", "training.per_device_train_batch_size=-1"),
        *("training.num_train_epochs=abc", "training.logging_steps=abc", "training.bf16=abc"),
        *("training.warmup_steps=abc", "training.learning_rate=abc", "training.seed=abc"),
        *("training.eval_strategy=later", "model.foo=1"),
        "training.report_to=comet_ml",
    ],
)
def test_a_training_value_of_the_wrong_kind_is_one_line(
    override: str, reasoning_file: Path, tmp_path: Path
) -> None:
    arguments = [f"model={shipped('storm')}", f"data={reasoning_file}", f"output_dir={tmp_path}/o"]
    result = run_storm("train", "sft", *arguments, override)
    assert result.exit_code == 1 and re.fullmatch(r"storm: .*\n", result.stderr), result.stderr
    assert override.partition("=")[0].rpartition(".")[2] in result.stderr or "later" in override


def test_doctor_says_what_a_bug_report_needs() -> None:
    facts = json.loads(run_storm("doctor", "--json").stdout)
    assert set(facts) == {"storm", "system", "devices", "packages", "programs"}
    assert facts["storm"]["version"] == version("storm-vlm")
    assert facts["packages"]["transformers"] == version("transformers")
    assert not {"storm-vlm", "ruff"} & set(facts["packages"])
    assert "transformers: " in run_storm("doctor").stdout
