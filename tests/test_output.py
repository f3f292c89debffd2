"""What was asked is what is answered, and what was there stays: identity, locks, outputs over inputs."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_storm

from storm_vlm.data.identity import checkpoint_identity, clip_identity, rows_identity
from storm_vlm.data.output import OutputError, check_outputs, exclusive
from storm_vlm.data.row import read_rows, write_rows
from storm_vlm.data.store import Store
from storm_vlm.lab.checkpoints import shipped

HOLD = (
    "import sys, time; from pathlib import Path; from storm_vlm.data.output import exclusive\n"
    "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"
)


@pytest.fixture
def rows_file(tmp_path: Path, reasoning_file: Path) -> Path:
    write_rows(tmp_path / "rows" / "rows.jsonl", read_rows(reasoning_file)[:4])
    return tmp_path / "rows" / "rows.jsonl"


def evaluate(checkpoint: object, rows: Path, out: Path, *more: object):
    return run_storm("evaluate", checkpoint, rows, "--out", out, "--reliance-rows", 0, *more)


def retrained(checkpoint: Path) -> None:
    """Other weights in the same folder, as long as before."""
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-2000:] = weights[-4000:-2000]
    (checkpoint / "model.safetensors").write_bytes(weights)


def test_answers_of_other_weights_are_not_reported(tmp_path: Path, rows_file: Path) -> None:
    checkpoint = tmp_path / "ck"
    shutil.copytree(shipped("storm"), checkpoint)
    assert evaluate(checkpoint, rows_file, tmp_path / "run").exit_code == 0
    again = evaluate(checkpoint, rows_file, tmp_path / "run")
    assert again.exit_code == 0 and "4 of 4 answers were there already" in again.stderr
    for file in checkpoint.iterdir():  # another time of change is no other content
        os.utime(file, (1, 1))
    assert evaluate(checkpoint, rows_file, tmp_path / "run").exit_code == 0
    before = (tmp_path / "run" / "answers-0.jsonl").read_bytes()
    retrained(checkpoint)
    refused = evaluate(checkpoint, rows_file, tmp_path / "run")
    assert refused.exit_code == 1 and "holds answers of other weights" in refused.stderr
    assert "another --out" in refused.stderr
    assert (tmp_path / "run" / "answers-0.jsonl").read_bytes() == before
    assert evaluate(checkpoint, rows_file, tmp_path / "run2").exit_code == 0


def test_answers_about_other_clips_are_not_reported(tmp_path: Path, rows_file: Path) -> None:
    rows = read_rows(rows_file)
    clip = tmp_path / "clip.mp4"
    shutil.copy(rows[0].video, clip)
    gone = rows[1].model_copy(update={"video": str(tmp_path / "late.mp4")})
    write_rows(rows_file, [rows[0].model_copy(update={"video": str(clip)}), gone])
    arguments = (shipped("storm"), rows_file, tmp_path / "run", "--max-errors", 0.6)
    assert evaluate(*arguments).exit_code == 0
    shutil.copy(rows[1].video, tmp_path / "late.mp4")  # comes later: no other clip
    assert evaluate(*arguments).exit_code == 0
    shutil.copy(rows[2].video, clip)
    refused = evaluate(*arguments)
    assert refused.exit_code == 1 and "answers about other clips" in refused.stderr
    assert "clip.mp4" in refused.stderr


def test_a_failed_first_evaluation_does_not_occupy_its_folder(
    tmp_path: Path, rows_file: Path
) -> None:
    rows = read_rows(rows_file)
    missing = [row.model_copy(update={"video": "/nowhere/gone.mp4"}) for row in rows]
    write_rows(tmp_path / "bad.jsonl", missing)
    out = tmp_path / "run"
    assert evaluate(shipped("storm"), tmp_path / "bad.jsonl", out).exit_code == 1
    assert evaluate("m", rows_file, out, "--base-url", "http://localhost:9/v1").exit_code != 0
    assert evaluate(shipped("storm"), rows_file, out).exit_code == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text((out / "run.json").read_text())
    told = run_storm("report", tmp_path)
    assert told.exit_code == 0 and "empty holds no answers yet: left out" in told.stderr
    alone = run_storm("report", empty)
    assert alone.exit_code == 1 and "holds no answers yet" in alone.stderr


def train(base: Path, data: Path, output: Path, *more: str):
    return run_storm(
        *("train", "sft", f"model={base}", f"data={data}", f"output_dir={output}"),
        *("training.max_steps=1", "training.per_device_train_batch_size=2"),
        *("training.report_to=none", *more),
    )


def test_training_again_from_other_inputs_is_refused(
    tmp_path: Path, rows_file: Path, backbone: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(backbone, base)
    typo = train(base, rows_file, out, "training.per_device_train_batch_size=0")
    assert typo.exit_code != 0
    gone = [r.model_copy(update={"video": "/nowhere/gone.mp4"}) for r in read_rows(rows_file)]
    write_rows(tmp_path / "gone.jsonl", gone)
    assert train(base, tmp_path / "gone.jsonl", out).exit_code == 1
    assert train(base, rows_file, out).exit_code == 0  # neither of them occupied the folder
    weights = (out / "model.safetensors").read_bytes()
    assert train(base, rows_file, out).exit_code == 0
    rows = read_rows(rows_file)
    write_rows(rows_file, [row.model_copy(update={"answer": "up"}) for row in rows])
    changed = train(base, rows_file, out)
    assert changed.exit_code == 1 and "rows.jsonl was before it changed" in changed.stderr
    write_rows(rows_file, rows)
    assert train(base, rows_file, out).exit_code == 0
    retrained(base)
    changed = train(base, rows_file, out)
    assert changed.exit_code == 1 and "base was before it changed" in changed.stderr
    assert (out / "model.safetensors").read_bytes() == weights


def test_training_overwrites_no_other_model(tmp_path: Path, rows_file: Path, backbone: str) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(backbone, base)
    shutil.copytree(backbone, other)
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).digest()
    for output in (base, base / ".." / "base", other):
        refused = train(base, rows_file, output)
        assert refused.exit_code == 1 and "would be overwritten" in refused.stderr
        kept = (output / "model.safetensors").read_bytes()
        assert hashlib.sha256(kept).digest() == digest


def test_no_verb_writes_over_what_it_reads(tmp_path: Path, rows_file: Path) -> None:
    before = rows_file.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(rows_file)
    for output in (rows_file, link):
        for verb in (
            ("import", "video-r1", rows_file, output, "--videos", "."),
            ("export", "ms-swift", rows_file, output),
            ("gallery", rows_file, "--out", output),
            ("leaks", rows_file, rows_file, "--num-frames", 0, "--out", output),
            ("leaks", rows_file, rows_file, "--num-frames", 0, "--remove", output),
        ):
            refused = run_storm(*verb)
            assert refused.exit_code == 1 and "would be overwritten" in refused.stderr, verb
            assert rows_file.read_bytes() == before
    for verb in (
        ("build", "--source", rows_file, "--out", rows_file.parent, "generator=keyframes"),
        ("build", "collect", "--source", rows_file, "--out", rows_file.parent),
        ("validate", shipped("storm"), rows_file, "--out", shipped("storm")),
        ("evaluate", shipped("storm"), rows_file, "--out", shipped("storm")),
    ):
        refused = run_storm(*verb)
        assert refused.exit_code == 1 and "would be overwritten" in refused.stderr, verb
        assert rows_file.read_bytes() == before


def test_an_import_of_nothing_leaves_what_was_there(tmp_path: Path, rows_file: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    shutil.copy(rows_file, kept)
    done = run_storm("import", "video-r1", rows_file, kept, "--videos", ".")
    assert done.exit_code == 1 and "no row was written" in done.stderr
    assert kept.read_bytes() == rows_file.read_bytes()


def test_a_second_process_gets_one_sentence_and_a_kill_leaves_no_lock(
    tmp_path: Path, rows_file: Path
) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, out, "60"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    try:
        for verb in (
            ("evaluate", shipped("storm"), rows_file, "--out", out),
            ("train", "sft", f"data={rows_file}", f"output_dir={out}"),
            ("build", "--source", rows_file, "--out", out),
            ("build", "collect", "--source", rows_file, "--out", out),
            ("validate", shipped("storm"), rows_file, "--out", out),
            ("reproduce", out, "--fast"),
            ("quickstart", out),
        ):
            second = run_storm(*verb)
            assert second.exit_code == 1, verb
            assert second.stderr.startswith(f"storm: another process is at work on {out}"), verb
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with exclusive(out), exclusive(out):  # one process may ask twice
        pass


def test_processes_of_one_launch_share_the_lock(tmp_path: Path, monkeypatch) -> None:
    with exclusive(tmp_path):
        monkeypatch.setenv("RANK", "1")
        assert subprocess.run([sys.executable, "-c", HOLD, tmp_path, "0"]).returncode == 0
        monkeypatch.setenv("RANK", "0")
        assert subprocess.run([sys.executable, "-c", HOLD, tmp_path, "0"]).returncode == 1


def test_lost_answers_are_no_result(tmp_path: Path, rows_file: Path, monkeypatch) -> None:
    """Something else replaces the file while the run appends to it."""
    from storm_vlm.evaluation import runner

    answers = runner.answer_rows

    def replaced(*arguments):
        for records in answers(*arguments):
            yield records
            file = tmp_path / "run" / "answers-0.jsonl"
            file.unlink(missing_ok=True)
            file.touch()

    monkeypatch.setattr(runner, "answer_rows", replaced)
    lost = evaluate(shipped("storm"), rows_file, tmp_path / "run", "--batch-size", 2)
    assert lost.exit_code == 1 and "holds 0 of 4 answers" in lost.stderr
    assert "summary" not in json.loads((tmp_path / "run" / "run.json").read_text())


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, rows_file: Path
) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "out"
    for verb in (
        ("evaluate", shipped("storm"), rows_file, "--out", inside),
        ("validate", shipped("storm"), rows_file, "--out", inside),
        ("leaks", rows_file, rows_file, "--out", inside / "leaks.json"),
        ("gallery", rows_file, "--out", inside / "page.html"),
        ("leaks", rows_file, rows_file, "--remove", tmp_path),
    ):
        refused = run_storm(*verb)
        assert refused.exit_code == 1 and refused.stderr.startswith("storm: "), verb
        assert refused.stderr.count("\n") == 1, refused.stderr


def test_identities(tmp_path: Path, rows_file: Path) -> None:
    rows = read_rows(rows_file)
    moved = tmp_path / "moved.mp4"
    shutil.copy2(rows[0].video, moved)
    assert clip_identity(str(moved)) == clip_identity(rows[0].video) != clip_identity("/nowhere")
    elsewhere = rows[0].model_copy(update={"video": str(moved)})
    assert rows_identity([elsewhere]) == rows_identity(rows[:1]) != rows_identity(rows[1:2])
    copied, store = tmp_path / "copied", Store(tmp_path / "store")
    shutil.copytree(shipped("storm"), copied)
    first = checkpoint_identity(str(copied), store)
    (copied / "log_history.json").write_text("[]")
    assert checkpoint_identity(str(copied), store) == first
    assert checkpoint_identity(str(shipped("storm")), store) == first
    retrained(copied)
    assert checkpoint_identity(str(copied), store) != first
    assert checkpoint_identity("org/model", store) == "org/model"


def test_check_outputs(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("x")
    check_outputs([None, tmp_path / "new" / "b"], [source, None, "hub/name"])
    with pytest.raises(OutputError, match="would be overwritten"):
        check_outputs([tmp_path / "." / "a"], [source])
    with pytest.raises(OutputError, match="is a folder"):
        check_outputs([tmp_path], [source])
