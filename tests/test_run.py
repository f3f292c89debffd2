"""Run folders: kept as they grow, gone on with after a kill, shared between processes; the command around them."""

import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_endpoint import serving

from storm_vlm import StormPipeline
from storm_vlm.data import video
from storm_vlm.data.collator import Question
from storm_vlm.data.row import read_rows, write_rows
from storm_vlm.data.video import Clip, VideoError, read_video
from storm_vlm.errors import StormError
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.question_set import NO_ROOM, QuestionSet
from storm_vlm.evaluation.run_folder import RunError, read_records, read_run
from storm_vlm.evaluation.runner import run
from storm_vlm.evaluation.summary import summarize
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world

FRAMES = Frames(6)


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


@pytest.fixture(scope="module")
def rows_file(reasoning_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows, the third without its video."""
    rows = read_rows(reasoning_file)[:7]
    rows[2] = rows[2].model_copy(update={"video": "/nowhere/gone.mp4"})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    return path


@pytest.fixture(scope="module")
def whole(storm, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, Latent(storm), question_set(rows_file), {"model": "c"}, 2)
    return folder


def question_set(rows_file: Path, **kwargs: Any) -> QuestionSet:
    return QuestionSet.read(rows_file, None, None, frames=FRAMES, **kwargs)


def content(folder: Path) -> dict[str, Any]:
    """What does not depend on the clock."""
    return {
        r.id: (r.correct, r.error, r.reply and (r.reply.text, r.reply.tokens, r.reply.frame_times))
        for r in read_records(folder)
    }


def test_rows_about_one_clip_are_asked_together_and_kept_in_their_order(storm, tmp_path) -> None:
    rows = read_rows(build_world(tmp_path, "reasoning", "test", 3, questions=3))
    scattered = [row for i in range(3) for row in rows[i::3]]
    reads: list[str] = []

    def read(path: str, *window: Any) -> Clip:
        reads.append(path)
        return read_video(path, *window)

    frames = Frames(6, read)
    folder = tmp_path / "run"
    finished = run(folder, Latent(storm, frames), QuestionSet(scattered, frames), {}, 2)
    assert [record.id for record in finished.records] == [row.id for row in scattered]
    assert reads == list(dict.fromkeys(row.video for row in rows))
    alone = [storm.answer_batch([row])[0].text for row in scattered]
    assert [record.reply and record.reply.text for record in finished.records] == alone


def path_of(clip: Clip | None) -> str:
    assert clip is not None
    return clip.path


def test_clips_are_read_ahead_by_other_processes(storm, tmp_path, monkeypatch) -> None:
    rows = read_rows(build_world(tmp_path, "reasoning", "test", 4, questions=2))
    rows[4] = rows[4].model_copy(update={"video": "/nowhere/gone.mp4"})
    here: list[str] = []

    @functools.wraps(read_video)  # by its name, other processes find the real one
    def read(path: str, *window: Any) -> Clip:
        here.append(path)
        return read_video(path, *window)

    monkeypatch.setattr(video, "read_video", read)
    frames, part = Frames(6, read), rows[0].model_copy(update={"end": 1.0})
    with frames.ahead(rows, 2, 2):
        assert [path_of(frames.read(row)) for row in rows[:4]] == [row.video for row in rows[:4]]
        assert here == []
        with pytest.raises(VideoError, match="gone"):
            frames.read(rows[4])
        frames.read(part)
        assert here == [part.video]
        assert path_of(frames.read(rows[6])) == rows[6].video
        frames.read(rows[0])  # it has passed by
        assert here == [part.video, rows[0].video]
    monkeypatch.undo()
    assert not multiprocessing.active_children()
    for readers in (0, 2):
        folder, frames = tmp_path / f"run{readers}", Frames(6)
        finished = run(folder, Latent(storm, frames), QuestionSet(rows, frames), {}, 2, readers)
        assert sum(record.error is not None for record in finished.records) == 1
        assert 0 < finished.provenance["busy"] < 1
    assert content(tmp_path / "run2") == content(tmp_path / "run0")


def test_a_clip_that_crashes_its_reader_is_the_only_one_lost(
    reasoning_file, tmp_path, monkeypatch
) -> None:
    (tmp_path / "crashing.py").write_text(
        "import os\nfrom storm_vlm.data.video import read_video\n"
        "def read(path, *window):\n"
        "    return os.abort() if 'crash' in path else read_video(path, *window)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    videos = sorted({row.video for row in read_rows(reasoning_file)})[:5]
    paths = [*videos[:2], "crash.mp4", *videos[2:]]
    questions = [Question(path, "What?") for path in paths]
    frames = Frames(2, importlib.import_module("crashing").read)
    with frames.ahead(questions, 2, 4):
        for path, question in zip(paths, questions, strict=True):
            if path == "crash.mp4":
                with pytest.raises(VideoError, match="the decoder crashed"):
                    frames.read(question)
            else:
                assert path_of(frames.read(question)) == path


def test_clips_of_large_frames_are_asked_first(tmp_path) -> None:
    rows = read_rows(build_world(tmp_path, "reasoning", "test", 4, questions=2))
    sizes = dict(zip([row.id for row in rows], [10, 10, 5, 5, 20, 20, 10, 10], strict=True))
    clips = QuestionSet(rows, FRAMES, sizes=sizes).by_length(rows)
    assert [[sizes[row.id] for row in clip] for clip in clips] == [
        [20] * 2,
        [10] * 2,
        [10] * 2,
        [5] * 2,
    ]
    assert all(len({row.video for row in clip}) == 1 for clip in clips)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert set(question_set(tmp_path / "rows.jsonl").sizes.values()) == {128 * 128}


def test_what_does_not_fit_is_asked_in_halves(storm, rows_file, tmp_path, caplog) -> None:
    asked: list[int] = []

    class Small(Latent):
        def answer(self, questions):
            asked.append(len(questions))
            if len(questions) > 2 or questions[0].video == large:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return super().answer(questions)

    rows = read_rows(rows_file)
    rows = [*rows[:2], *rows[3:]]
    large = rows[-1].video
    finished = run(tmp_path / "run", Small(storm), QuestionSet(rows, FRAMES), {}, 6)
    assert max(asked) == 6 and asked.count(3) == 2
    assert {r.id: r.error for r in finished.records if r.error} == {rows[-1].id: NO_ROOM}
    assert "6 at a time do not fit" in caplog.text


def test_every_row_has_a_record_and_a_missing_video_is_counted(whole, rows_file) -> None:
    rows, records = read_rows(rows_file), read_records(whole)
    assert [record.id for record in records] == [row.id for row in rows]
    assert [record.error is not None for record in records] == [i == 2 for i in range(7)]
    assert "gone.mp4" in str(records[2].error) and not records[2].correct
    summary = summarize(read_run(whole))
    assert summary.n == 7 and summary.errors == 1 / 7 and summary.unparsed == 0
    assert summary.accuracy.mean == sum(record.correct for record in records) / 7
    assert summary.opened == 1 and summary.seconds and summary.seconds.phases["latent"] > 0
    told = json.loads((whole / "run.json").read_text())
    assert told["summary"] == json.loads(json.dumps(asdict(summary)))
    assert told["pixels"]["longest_edge"] == 64 * 64
    assert told["first_prompt"] == rows[0].question and told["n_expected"] == 7


def test_a_killed_run_goes_on(storm, whole, rows_file, tmp_path) -> None:
    lines = (whole / "answers-0.jsonl").read_text().splitlines(True)
    torn = tmp_path / "run"
    torn.mkdir()
    (torn / "run.json").write_bytes((whole / "run.json").read_bytes())
    # Two processes had answered: rows 0 to 2 here (one could not be), 5 there, and half of 6.
    (torn / "answers-0.jsonl").write_text("".join(lines[:3]))
    (torn / "answers-3.jsonl").write_text(lines[5] + lines[6][:40])
    asked: list[str] = []

    class Watched(Latent):
        def answer(self, rows):
            asked.extend(row.id for row in rows)
            return super().answer(rows)

    run(torn, Watched(storm), question_set(rows_file), {"model": "c"}, 1)
    ids = [row.id for row in read_rows(rows_file)]
    assert asked == [ids[i] for i in (3, 4, 6)]  # and 2 still has no video
    assert content(torn) == content(whole) and len(read_records(torn)) == 7


def test_a_folder_of_another_run_is_refused(storm, whole, rows_file) -> None:
    before = (whole / "run.json").read_bytes()
    with pytest.raises(RunError, match="model"):
        run(whole, Latent(storm), question_set(rows_file), {"model": "other"}, 2)
    with pytest.raises(RunError, match="control"):
        run(whole, Latent(storm), question_set(rows_file, control="one_frame"), {"model": "c"}, 2)
    with pytest.raises(RunError, match="max_new_tokens"):
        run(whole, Latent(storm, None, 5), question_set(rows_file), {"model": "c"}, 2)
    assert (whole / "run.json").read_bytes() == before


def test_what_does_not_apply_is_refused(rows_file, tmp_path) -> None:
    with pytest.raises(RunError, match="--benchmark"):
        QuestionSet.read(tmp_path, None, None, frames=FRAMES)
    with pytest.raises(RunError, match="no official prompt"):
        question_set(rows_file, prompt="official")
    with pytest.raises(RunError, match="no options"):
        question_set(rows_file, control="permuted_options")
    with pytest.raises(RunError, match="published order"):
        QuestionSet(read_rows(rows_file), FRAMES, None, "permuted_options", "official").check(
            rows_file
        )
    with pytest.raises(
        StormError, match="benchmarks: there is no 'nonsense'; choose from videomme,"
    ):
        BENCHMARKS["nonsense"]


def storm_evaluate(*arguments: object, launcher: tuple[str, ...] = ()) -> Any:
    return subprocess.run(
        [sys.executable, "-m", *launcher, "storm_vlm", "evaluate", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_are_one(whole, rows_file, tmp_path) -> None:
    """(`accelerate launch` starts CPU processes through MPI alone; so torchrun does.)"""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    out = tmp_path / "two"
    arguments = (shipped("storm"), rows_file, "--out", out, "--max-errors", 0.5, "--json")
    done = storm_evaluate(*arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    shares = [len((out / f"answers-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert shares == [4, 3]
    assert content(out) == content(whole)
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    assert json.loads(done.stdout)["n"] == 7 and done.stderr.count("gone.mp4") == 1
    assert done.stderr.count("Latent reliance, 6 rows") == 1  # by one of them
    assert json.loads((out / "reliance.json").read_text())["drawn_from"] == 6


def test_too_many_errors_fail_the_command(rows_file) -> None:
    with serving(lambda messages: "<answer>b2</answer>") as (url, requests):
        arguments = ("some-model", rows_file, "--base-url", url, "--reasoner", "cot")
        done = storm_evaluate(*arguments, "--num-frames", 3, "--json")
    assert done.returncode == 1 and "1 of 7 rows could not be asked" in done.stderr
    assert "Traceback" not in done.stderr and len(requests) == 6
    assert all(len(request["messages"][0]["content"]) == 7 for request in requests)
    assert json.loads(done.stdout)["tokens"] == 100
