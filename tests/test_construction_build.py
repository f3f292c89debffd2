"""Data construction as a whole: what goes in, what comes out, and that a kill loses and repeats nothing."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run_storm
from kill_trials import _Trial, bare_rows, kill_trials, stub_config
from stub_teacher import Call, StubTeacher, completion, send

from storm_vlm.construction.build import Builder, Shard, collect, run
from storm_vlm.construction.config import STEPS, BuildConfig
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.data.store import Store
from storm_vlm.data.video import read_video
from storm_vlm.errors import StormError
from storm_vlm.lab.world.clips import build_world
from storm_vlm.lab.world.generator import with_wrong_thoughts
from storm_vlm.lab.world.wrong import FAULTS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_rows(tmp_path_factory.mktemp("bare"), 10)


@pytest.fixture
def teacher() -> Iterator[StubTeacher]:
    with StubTeacher() as server:
        yield server


def config(**changes: Any) -> BuildConfig:
    return BuildConfig.model_validate({"generator": "keyframes", "workers": 4, **changes})


def told(server: StubTeacher, **changes: Any) -> dict[str, Any]:
    return {"model": "stub", "base_url": server.url, **changes}


def edited(source: Path, path: Path, **fields: Any) -> Path:
    write_rows(path, [row.model_copy(update=fields) for row in read_rows(source)])
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_with_all_that_led_to_it(source: Path, teacher: StubTeacher, tmp_path: Path) -> None:
    summary = run(source, tmp_path, stub_config(teacher))
    kept, rejects = read_rows(tmp_path / "rows.jsonl"), lines(tmp_path / "rejects.jsonl")
    assert len(kept) + len(rejects) == 10 and min(len(kept), len(rejects)) > 0
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["rejected"] == {"frozen": len(rejects)} and summary["kept"] == len(kept)
    assert summary["teacher"]["calls_made"] == len(teacher.calls) == 20
    originals = {row.id: row for row in read_rows(source)}
    assert [row["id"] for row in lines(tmp_path / "rows.jsonl")] == [
        id for id in originals if id in {row.id for row in kept}
    ]
    for row in kept:
        thought = row.thought_video
        assert thought and thought.source == "keyframes" and row.plan and row.keyframes
        provenance = thought.provenance
        assert provenance["steps"]["keyframes"]["teacher"] == "stub"
        responses = [key for step in provenance["steps"].values() for key in step["responses"]]
        assert {Path(path).stem for path in responses} <= {call.key for call in teacher.calls}
        assert provenance["scores"]["frozen"] >= 0.85 and provenance["key"] in thought.path
        shown = read_video(row.video, 6)
        first = shown.frames[shown.timestamps.tolist().index(row.keyframes[0])]
        difference = read_video(thought.path, 99).frames[0].astype(int) - first
        assert abs(difference).mean() < 4  # the first keyframe, encoded
        bare = {"keyframes": (), "plan": None, "thought_video": None}
        assert row.model_copy(update=bare) == originals[row.id]
    for reject in rejects:
        assert reject["score"] < reject["threshold"] == 0.85
        assert Row.model_validate(reject["row"]).id == reject["id"]
    run(source, tmp_path, stub_config(teacher))
    assert len(teacher.calls) == 20  # all there


def test_the_teacher_sees_the_answer_only_if_told(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    seen: list[str] = []

    def respond(handler: Any, body: dict[str, Any]) -> None:
        seen.append(json.dumps(body["messages"]))
        StubTeacher.respond(teacher, handler, body)

    teacher.respond = respond  # type: ignore[method-assign]
    for shown in (True, False):
        run(source, tmp_path / str(shown), config(show_answer=shown, teacher=told(teacher)))
        assert all(("Correct answer" in text) == shown for text in seen) and len(seen) == 20
        seen.clear()


def test_rows_of_a_test_split_are_refused_before_anybody_is_paid(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    rows = edited(source, tmp_path / "test.jsonl", split="test")
    with pytest.raises(StormError, match="10 rows are of another split than train"):
        run(rows, tmp_path / "out", config(teacher=told(teacher)))
    assert not teacher.calls
    with pytest.raises(ValueError, match="splits"):
        config(splits=["test"])
    rows = edited(source, tmp_path / "validation.jsonl", split="validation")
    assert run(rows, tmp_path / "out", config(splits=["validation"]))["kept"]


def test_what_a_row_has_is_kept_and_not_paid_for(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    rows = edited(source, tmp_path / "given.jsonl", keyframes=(0.0, 1.0), plan="as it was given")
    run(rows, tmp_path / "out", config(teacher=told(teacher)))
    kept = read_rows(tmp_path / "out" / "rows.jsonl")
    assert kept and not teacher.calls
    assert {(row.keyframes, row.plan) for row in kept} == {((0.0, 1.0), "as it was given")}
    for row in kept:
        given = {"status": "given"}
        assert row.thought_video
        assert row.thought_video.provenance["steps"] == {"keyframes": given, "plan": given}
    finished = tmp_path / "out" / "rows.jsonl"
    again = run(finished, tmp_path / "again", config(teacher=told(teacher)))
    assert again["thought_videos_made"] == 0 and not teacher.calls
    assert again["own_thought_videos"] == again["kept"] == len(kept)
    paths = [row.thought_video.path for row in kept if row.thought_video]
    for row in read_rows(tmp_path / "again" / "rows.jsonl"):
        assert row.thought_video and row.thought_video.path in paths
        assert row in kept  # nothing is added to what is complete


def test_step_by_step_is_all_at_once(source: Path, teacher: StubTeacher, tmp_path: Path) -> None:
    last = source
    for step in STEPS:
        run(last, tmp_path / step, config(steps=[step], teacher=told(teacher)))
        last = tmp_path / step / "rows.jsonl"
        if step == "prompts":
            assert all(row.meta["video_prompt"] for row in read_rows(last))
            rows = [
                row.model_copy(
                    update={"meta": {k: v for k, v in row.meta.items() if k != "video_prompt"}}
                )
                for row in read_rows(last)
            ]
            write_rows(last, rows)  # `run` asks for none: the slide show needs no words
    run(source, tmp_path / "run", config(teacher=told(teacher)))

    def plain(path: Path) -> list[dict[str, Any]]:
        found = lines(path)
        for row in found:
            row["thought_video"].pop("path")
            row["thought_video"]["provenance"]["steps"].pop("prompt", None)
        return found

    assert plain(last) == plain(tmp_path / "run" / "rows.jsonl")


def test_shards_make_the_rows_of_one_run(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    settings = config(teacher=told(teacher))
    run(source, tmp_path / "one", settings)
    calls = len(teacher.calls)
    counts = []
    with pytest.raises(StormError, match="no finished row"):
        collect(source, tmp_path / "many", settings)
    assert not list((tmp_path / "many").glob("*.jsonl"))
    for number in (1, 2, 3):
        shard = Shard.parse(f"{number}/3")
        counts.append(run(source, tmp_path / "many", settings, shard)["rows"])
        assert collect(source, tmp_path / "many", settings)["unfinished"] == 10 - sum(counts)
    assert sum(counts) == 10 and max(counts) < 10 and len(teacher.calls) == 2 * calls
    assert collect(source, tmp_path / "many", settings)["unfinished"] == 0
    for name in ("rows.jsonl", "rejects.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    with pytest.raises(StormError, match="a shard is i/n"):
        Shard.parse("4/3")


def test_max_cost_stops_cleanly_and_more_money_goes_on(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    command = ["build", "--source", str(source), "--out", str(tmp_path), "--workers", "2"]
    command += ["--model", "stub", "--base-url", teacher.url, "--price-in", "1"]
    command += ["generator=keyframes"]  # 0.001 a call, 20 calls in all

    def storm(*more: str) -> Any:
        return run_storm(*command, *more)

    first = storm("--max-cost", "0.0085")
    assert first.exit_code == 3 and "stopped at max_cost" in first.output
    assert 9 <= len(teacher.calls) <= 10  # those under way may end
    some = len(read_rows(tmp_path / "rows.jsonl")) + len(lines(tmp_path / "rejects.jsonl"))
    assert (
        0 < some < 10
        and json.loads((tmp_path / "summary.json").read_text())["unfinished"] == 10 - some
    )
    second = storm("--max-cost", "0.1")
    assert second.exit_code == 0 and len(teacher.calls) == 20


def test_unanswered_rows_are_left_for_the_next_run(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    def down(handler: Any, body: dict[str, Any]) -> None:
        send(handler, 503, {"error": {}})

    teacher.respond = down  # type: ignore[method-assign]
    settings = config(teacher=told(teacher, retries=0))
    summary = run(source, tmp_path, settings)
    assert summary["stopped"] == "unanswered" and summary["unfinished"] == 10
    del teacher.respond
    assert run(source, tmp_path, settings)["unfinished"] == 0


def test_a_useless_teacher_leaves_a_trace(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    def useless(handler: Any, body: dict[str, Any]) -> None:
        send(handler, 200, completion("I cannot see any frames."))

    teacher.respond = useless  # type: ignore[method-assign]
    given = edited(source, tmp_path / "planned.jsonl", plan="as given")
    run(given, tmp_path / "a", config(teacher=told(teacher)))
    for row in read_rows(tmp_path / "a" / "rows.jsonl"):
        assert row.thought_video and len(row.keyframes) == 4
        note = row.thought_video.provenance["steps"]["keyframes"]
        assert note["status"] == "invalid, uniform" and len(note["responses"]) == 3
    summary = run(source, tmp_path / "b", config(teacher=told(teacher)))
    assert summary["rejected"] == {"plan_invalid": 10} and summary["asked_again"] == 10
    for reject in lines(tmp_path / "b" / "rejects.jsonl"):
        assert "Invalid JSON" in reject["detail"] and "I cannot see" in reject["detail"]


def test_a_teacher_that_was_mended_is_asked_again(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    def moderated(handler: Any, body: dict[str, Any]) -> None:
        send(handler, 400, {"error": {"code": "data_inspection_failed"}})

    teacher.respond = moderated  # type: ignore[method-assign]
    summary = run(source, tmp_path / "a", config(teacher=told(teacher)))
    assert summary["rejected"] == {"plan_refused": 10}
    del teacher.respond
    teacher.calls.clear()
    assert run(source, tmp_path / "a", config(teacher=told(teacher)))["asked_again"] == 0
    assert len(teacher.calls) == 20
    run(source, tmp_path / "b", config(teacher=told(teacher)))
    for name in ("rows.jsonl", "rejects.jsonl"):
        mended, undisturbed = ((tmp_path / out / name).read_text() for out in "ab")
        assert mended == undisturbed.replace(str(tmp_path / "b"), str(tmp_path / "a"))


def test_a_row_that_cannot_be_put_is_a_reject_and_costs_nothing(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    rows = edited(source, tmp_path / "odd.jsonl", question="What is <|im_end|>?")
    summary = run(rows, tmp_path / "out", config(teacher=told(teacher)))
    assert summary["rejected"] == {"text": 10} and not teacher.calls


def test_a_broken_video_is_a_reject(source: Path, tmp_path: Path) -> None:
    rows = read_rows(source)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows[0] = rows[0].model_copy(update={"video": str(tmp_path / "broken.mp4")})
    rows[1] = rows[1].model_copy(update={"video": str(tmp_path / "missing.mp4")})
    write_rows(tmp_path / "rows.jsonl", rows)
    summary = run(tmp_path / "rows.jsonl", tmp_path / "out", config())
    assert summary["rejected"]["video"] == 2 and summary["unfinished"] == 0


def test_nothing_kept_is_no_success(source: Path, tmp_path: Path) -> None:
    command = ["build", "--source", str(source), "--out", str(tmp_path), "generator=keyframes"]
    strict = run_storm(*command, "filters.blank=2")
    assert strict.exit_code == 5 and "every row was rejected" in strict.output
    assert len(lines(tmp_path / "rejects.jsonl")) == 10
    assert run_storm(*command).exit_code == 0


def test_results_belong_to_what_a_video_shows_not_to_its_name(
    source: Path, teacher: StubTeacher, tmp_path: Path
) -> None:
    one, other, *_ = read_rows(source)
    clip = tmp_path / "clip.mp4"
    write_rows(tmp_path / "rows.jsonl", [one.model_copy(update={"video": str(clip)})])
    settings = config(teacher=told(teacher))

    def build_with(video: str) -> Any:
        shutil.copy(video, clip)
        return run(tmp_path / "rows.jsonl", tmp_path / "out", settings)["teacher"]["calls_made"]

    assert [build_with(video) for video in (one.video, other.video, one.video)] == [2, 2, 0]
    write_rows(tmp_path / "moved.jsonl", [one])
    assert run(tmp_path / "moved.jsonl", tmp_path / "out", settings)["teacher"]["calls_made"] == 0
    assert read_rows(tmp_path / "out" / "rows.jsonl")[0].video == one.video


def test_a_store_that_cannot_be_read_is_no_fault_of_a_row(source: Path, tmp_path: Path) -> None:
    builder = Builder(config(), tmp_path)
    (row, *_) = read_rows(source)
    builder.store.path("rows", builder.key(row)).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        builder.finished(row)
    gone = row.model_copy(update={"video": str(tmp_path / "gone.mp4")})
    found = builder.finished(gone)
    assert found and found.rejected == "video"


def test_the_future_is_what_follows_the_window(source: Path, tmp_path: Path) -> None:
    (row, other, *_) = read_rows(source)
    write_rows(tmp_path / "cut.jsonl", [row.model_copy(update={"end": 0.6}), other])
    summary = run(
        tmp_path / "cut.jsonl", tmp_path, config(generator="future", filters={"frozen": None})
    )
    assert summary["rejected"] == {"no_future": 1}
    (built,) = read_rows(tmp_path / "rows.jsonl")
    assert built.thought_video and built.thought_video.source == "future"
    made = read_video(built.thought_video.path, 99).frames.astype(int)
    whole = read_video(row.video, 99).frames
    assert len(made) == 3 and abs(made - whole[3:]).mean() < 4


def test_the_world_s_oracle_is_simulated_again(tmp_path: Path) -> None:
    rows = build_world(tmp_path / "world", "reasoning", "train", 6, seed=3)
    run(rows, tmp_path, config(generator="world", replace=True))
    for made, own in zip(read_rows(tmp_path / "rows.jsonl"), read_rows(rows), strict=True):
        assert made.thought_video and own.thought_video
        assert made.thought_video.path != own.thought_video.path
        pair = [read_video(v.path, 99).frames for v in (made.thought_video, own.thought_video)]
        np.testing.assert_array_equal(*pair)
    other = edited(rows, tmp_path / "other.jsonl", question="Where?")
    summary = run(other, tmp_path / "other", config(generator="world", replace=True))
    assert summary["rejected"] == {"no_scene": 6}


def test_the_world_errs_as_often_as_it_is_told(tmp_path: Path) -> None:
    """Every wrong video differs from the true one, and no other does; a share's are among a larger share's."""
    rows = read_rows(build_world(tmp_path / "world", "reasoning", "train", 24))
    kinds: dict[float, dict[str, str]] = {}
    for share in (0.25, 0.75):
        made = with_wrong_thoughts(rows, tmp_path / "wrong", share)
        kinds[share] = {
            row.id: row.thought_video.provenance["wrong"]
            for row in made
            if row.thought_video and "wrong" in row.thought_video.provenance
        }
        for row, true in zip(made, rows, strict=True):
            assert row.thought_video and true.thought_video
            pair = [read_video(v.path, 99).frames for v in (row.thought_video, true.thought_video)]
            assert np.array_equal(pair[0], pair[1]) == (row.id not in kinds[share]), row.id
            # It sets out from what is seen, unless it is of another scene; the codec leaves its traces.
            apart = abs(pair[0][:2].astype(int) - pair[1][:2]).mean()
            assert (apart < 1) == (kinds[share].get(row.id) != "scene"), (row.id, apart)
    assert kinds[0.25].items() < kinds[0.75].items() and len(kinds[0.75]) > 12
    assert set(kinds[0.75].values()) == set(FAULTS)


def test_kills_lose_and_repeat_nothing(source: Path, tmp_path: Path) -> None:
    """`tests/kill_trials.py` does the same more often, for the record."""
    found = kill_trials(source, tmp_path, 8, random.Random(0))
    assert found["kills_tried"] == 8
    assert not any(found[name] for name in found if name.startswith(("rows_l", "rows_d", "rows_c")))
    assert not found["teacher_calls_repeated"] and not found["thought_videos_repeated"]
    assert not found["rejects_changed"]
    assert found["teacher_calls_cut_off"] <= 8 * 4  # at most one for each kill and thread


def test_the_trial_notices_what_is_done_twice(tmp_path: Path) -> None:
    with StubTeacher() as teacher:
        trial = _Trial(tmp_path, teacher)
        store = Store(tmp_path / "store")
        store.write("teacher", "aa", b"{}")
        store.path("thoughts", "cc", ".mp4").parent.mkdir(parents=True)
        store.path("thoughts", "cc", ".mp4").write_bytes(b"one")

        def call(key: str, question: str, sent: float) -> Call:
            user = {"content": [{"text": question}]}
            return Call(key, {"messages": [{}, user]}, 0.0, sent)

        teacher.calls += [call("aa", "1", 9.9), call("bb", "2", 9.9), call("dd", "3", 5.0)]
        teacher.calls += [call("gg", "4", 9.9), call("hh", "4", 9.9)]
        trial.note_kill(
            10.0
        )  # aa is stored; dd and gg must have been; bb and hh may have been cut off
        teacher.calls += [call(key, "", 11.0) for key in ("aa", "bb", "dd", "gg", "hh", "ee", "ee")]
        store.path("thoughts", "cc", ".mp4").unlink()
        store.path("thoughts", "cc", ".mp4").write_bytes(b"two")
        trial._look()
        assert trial.found["teacher_calls_repeated"] == 4
        assert trial.found["teacher_calls_cut_off"] == 2
        assert trial.found["thought_videos_repeated"] == 1


def test_building_needs_no_torch() -> None:
    code = "import sys, storm_vlm.construction.build, storm_vlm.lab.world.clips; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
