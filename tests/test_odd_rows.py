"""One odd row does not end a run: all are looked at before the first is worked on, odd ones are named and skipped."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run_storm
from scripted_endpoint import serving
from stub_teacher import completion

from storm_vlm.analysis.validate import validate
from storm_vlm.data.check import RowFile, fault_lines, row_faults
from storm_vlm.data.collator import StormCollator
from storm_vlm.data.decode import VideoError
from storm_vlm.data.row import Row, RowError, read_rows, write_rows
from storm_vlm.data.video import write_video
from storm_vlm.evaluation.question_set import QuestionSet
from storm_vlm.evaluation.run_folder import RunError, read_records
from storm_vlm.evaluation.runner import run
from storm_vlm.inference.client import EndpointError
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.reasoners.single_turn import Direct
from storm_vlm.inference.remote_chat import RemoteChat
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.training.config import TrainConfig
from storm_vlm.training.train import sound_rows

FRAMES = Frames(2)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clips") / "wide.mp4"
    write_video(path, np.full((8, 2, 512, 3), 90, np.uint8), 4)
    return str(path)


@pytest.fixture(scope="module")
def odd(reasoning_rows: list[Row], wide: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows, of which the last two can be worked on."""
    many = tuple(f"option {i}" for i in range(27))
    changes: list[dict[str, Any]] = [
        {"video": "gone.mp4"},
        {"video": wide},
        {"question": "What does <|im_end|> mean?"},
        {"options": many, "answer": many[3]},
        {"start": 1.7e18},
        {},
        {},
    ]
    path = tmp_path_factory.mktemp("odd") / "rows.jsonl"
    rows = zip(reasoning_rows, changes, strict=False)
    write_rows(
        path, [row.model_copy(update={"id": f"r{i}", **c}) for i, (row, c) in enumerate(rows)]
    )
    return path


def test_rows_are_named_with_file_line_and_reason(odd: Path) -> None:
    faults = row_faults(read_rows(odd))
    lines = fault_lines(faults, odd).splitlines()
    reasons = (
        "no such video file",
        "more than 200 to 1",
        "<|im_end|>",
        "at most 26 options",
        "window starts",
    )
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True)):
        assert line.startswith(f"{odd}:{number + 1}: r{number}: ") and reason in line


def test_an_evaluation_goes_on_behind_odd_rows(odd: Path, tmp_path: Path) -> None:
    with serving(lambda messages: "A") as (url, requests):
        arguments = ("evaluate", "m", odd, "--base-url", url, "--out", tmp_path, "--num-frames", 2)
        done = run_storm(*arguments, "--max-errors", 0.8)
        assert done.exit_code == 0, done.output
        assert "5 of 7 rows cannot be asked, and are skipped:" in done.stderr
        assert f"{odd}:3: r2: text holds the control token" in done.stderr
        assert [r.error is None for r in read_records(tmp_path)] == [False] * 5 + [True] * 2
        again = run_storm(*arguments)
        assert again.exit_code == 1 and "5 of 7 rows could not be asked" in again.stderr
        assert len(requests) == 2 and "Traceback" not in again.output


def test_text_alone_needs_no_clip(odd: Path) -> None:
    questions = QuestionSet.read(odd, None, None, frames=FRAMES, control="text_only")
    assert list(questions.faults) == ["r2", "r3"]


def test_nothing_to_ask_is_an_error(odd: Path) -> None:
    with pytest.raises(RunError, match=r"rows.jsonl:1: r0: gone.mp4|no row can be asked"):
        QuestionSet.read(odd, None, 5, frames=FRAMES)


def test_a_training_is_refused_before_its_first_step_or_skips(
    odd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"model": "m", "data": str(odd), "output_dir": "out"}
    with pytest.raises(RowError, match=r"5 of 7 rows (.|\n)*skip_bad_rows=true\n.*:1: r0: "):
        sound_rows(TrainConfig.model_validate(settings), read_rows(odd))
    skipping = TrainConfig.model_validate({**settings, "skip_bad_rows": True})
    with caplog.at_level(logging.WARNING, "storm_vlm"):
        assert [row.id for row in sound_rows(skipping, read_rows(odd))] == ["r5", "r6"]
    assert "5 of 7 rows cannot be worked on, and are skipped" in caplog.text


class Chat(RemoteChat):
    """Behind whichever port the server has this time."""

    @property
    def settings(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A clip whose header and first frames are right."""
    path = tmp_path_factory.mktemp("clips") / "damaged.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8)
    write_video(path, frames, 8)
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = b"\xff" * third
    path.write_bytes(content)
    return str(path)


def test_damage_within_a_clip_is_its_row_s(
    damaged: str, reasoning_rows: list[Row], tmp_path: Path
) -> None:
    rows = [reasoning_rows[0], reasoning_rows[1].model_copy(update={"video": damaged})]
    assert row_faults(rows) == {}
    summary, _ = evaluated(lambda messages: "A", rows, tmp_path)
    assert summary["errors"] == 0.5 and "damaged.mp4" in str(read_records(tmp_path)[1].error)


def test_damage_within_a_clip_is_named_with_its_row_in_training(
    damaged: str, reasoning_rows: list[Row], processor: Any
) -> None:
    row = reasoning_rows[1].model_copy(update={"video": damaged})
    with pytest.raises(VideoError, match=rf"^{row.id}: .*damaged.mp4"):
        StormCollator(processor, 8, 0)([row])


def test_an_analysis_goes_on_without_rows_that_cannot_be_decoded(
    odd: Path, damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = read_rows(odd)
    rows[0] = rows[0].model_copy(update={"video": damaged})
    write_rows(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING, "storm_vlm"):
        validate(str(shipped("storm")), tmp_path / "rows.jsonl", tmp_path / "out")
    assert "5 of 7 rows cannot be worked on" in caplog.text and "damaged.mp4" in caplog.text
    assert json.loads((tmp_path / "out" / "reliance.json").read_text())["n"] == 2


def evaluated(
    script: Any, rows: list[Row], folder: Path, batch_size: int = 1, retries: int = 1
) -> tuple[Any, int]:
    """The run's summary, and how many requests it took."""
    with serving(script) as (url, requests):
        chat = Chat(url, "m", max_side=32, retries=retries)
        finished = run(folder, Direct(chat, FRAMES), QuestionSet(rows, FRAMES), {}, batch_size)
    assert [record.id for record in finished.records] == [row.id for row in rows]
    return finished.provenance["summary"], len(requests)


def of_the_second(outcome: Any) -> Any:
    """A script: "A" to all but the second question that it sees, and each time that comes back."""
    seen: list[str] = []

    def script(messages: Any) -> Any:
        text = json.dumps(messages)
        seen.extend([text] if text not in seen else [])
        return outcome if seen.index(text) == 1 else "A"

    return script


def with_message(message: Any, reason: str = "stop", **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": reason, "message": message}
    return {**completion(""), "choices": [choice], **fields}


@pytest.mark.parametrize(
    "outcome",
    [
        400,
        413,
        422,
        500,
        {**completion("A"), "choices": None},
        {**completion("A"), "choices": []},
        with_message(None),
        b"<html>busy</html>",
    ],
)
def test_one_request_s_trouble_is_its_row_s(
    outcome: Any, reasoning_rows: list[Row], tmp_path: Path
) -> None:
    rows = reasoning_rows[:3]
    summary, _ = evaluated(of_the_second(outcome), rows, tmp_path, retries=0)
    records = read_records(tmp_path)
    assert [record.error is None for record in records] == [True, False, True]
    assert summary["errors"] == 1 / 3 and summary["n"] == 3
    again, asked = evaluated(lambda messages: "A", rows, tmp_path)
    assert asked == 1 or outcome is None
    assert again["errors"] == 0


def test_a_batch_is_not_paid_twice_for_one_of_it(reasoning_rows: list[Row], tmp_path: Path) -> None:
    _, asked = evaluated(of_the_second(422), reasoning_rows[:4], tmp_path, 4)
    assert asked == 5  # the refused one again, by itself


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (with_message({"content": None, "reasoning_content": "hm"}, "length"), "cut_off"),
        (with_message({"content": None, "reasoning_content": "It is A."}), "empty"),
        (with_message({"content": ""}), "empty"),
        (with_message({"content": "", "refusal": "no"}), "filtered"),
        (with_message({"content": ""}, "content_filter"), "filtered"),
    ],
)
def test_answers_that_are_none_are_counted_and_explained(
    outcome: Any, fault: str, odd: Path, reasoning_file: Path, tmp_path: Path
) -> None:
    with serving(lambda messages: outcome) as (url, _):
        flags = ("--num-frames", 1, "--limit", 2, "--out", tmp_path)
        done = run_storm("evaluate", "m", reasoning_file, "--base-url", url, *flags)
    assert done.exit_code == 0
    name = fault.replace("_", " ")
    assert f"100.0% unparsed, 100.0% {name}\n" in done.stdout and f"\n{name}: " in done.stderr
    report = run_storm("report", tmp_path, "--out", tmp_path / "report")
    assert report.exit_code == 0, report.output
    assert f"{name} 100.0%" in (tmp_path / "report" / "report.md").read_text()


def test_parts_and_missing_counts_are_read(reasoning_rows: list[Row], tmp_path: Path) -> None:
    parts = with_message({"content": [{"type": "text", "text": "A"}]}, usage={"total_tokens": None})
    summary, _ = evaluated(lambda messages: parts, reasoning_rows[:2], tmp_path)
    assert summary["faults"] == {} and summary["tokens"] == 0
    assert {r.reply.text for r in read_records(tmp_path) if r.reply} == {"A"}


@pytest.mark.parametrize("outcome", [401, 404, b"<html>hello</html>"])
def test_a_wrong_set_up_ends_the_run(
    outcome: Any, reasoning_rows: list[Row], tmp_path: Path
) -> None:
    with pytest.raises(EndpointError, match=r"/v1|check address"):
        evaluated(lambda messages: outcome, reasoning_rows[:3], tmp_path, retries=0)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (b"null\n", r"answers-0.jsonl:3: .*asked again"),
        (b"garbage\n", r"answers-0.jsonl:3: .*asked again"),
        (None, r"answers-0.jsonl:3: 'other' is no row of this run"),
    ],
)
def test_a_line_that_is_none_of_ours_is_named(
    bad: bytes | None, match: str, reasoning_rows: list[Row], tmp_path: Path
) -> None:
    rows = reasoning_rows[:2]
    evaluated(lambda messages: "A", rows, tmp_path)
    file = tmp_path / "answers-0.jsonl"
    line = json.loads(file.read_bytes().splitlines()[0]) | {"id": "other"}
    file.write_bytes(file.read_bytes() + (bad or json.dumps(line).encode() + b"\n"))
    with pytest.raises(RunError, match=match):
        evaluated(lambda messages: "A", rows, tmp_path)


def test_what_a_power_cut_leaves_is_cut_off(reasoning_rows: list[Row], tmp_path: Path) -> None:
    rows = reasoning_rows[:2]
    evaluated(lambda messages: "A", rows, tmp_path)
    file = tmp_path / "answers-0.jsonl"
    first, second = file.read_bytes().splitlines(True)
    file.write_bytes(first + b"\0" * 40 + b"\n" + b"\0" * 9 + second[:50])
    _, asked = evaluated(lambda messages: "A", rows, tmp_path)
    assert asked == 1


def test_a_file_of_rows_is_read_anew_and_may_not_change(odd: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(odd.read_bytes())
    rows = RowFile(file)
    every = [row.id for row in rows]
    assert len(rows) == len(every) and [row.id for row in rows] == every
    assert [row.id for row in RowFile(file, lambda row: row.id == every[1])] == every[1:2]
    reading = iter(rows)
    next(reading)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(RowError, match="has changed since the work began"):
        list(reading)
