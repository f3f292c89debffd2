import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from storm_vlm.data.row import Row, RowError, ThoughtVideo, read_rows, write_rows

FULL: dict[str, Any] = {
    "version": 1,
    "id": "a-1",
    "video": "clips/a.mp4",
    "start": 1.5,
    "end": 4,
    "question": "Which way does it fall? Où ça?",
    "options": ["left", "right"],
    "answer": "right",
    "keyframes": [1.5, 2.25],
    "plan": "first it tips, then it falls",
    "thought_video": {
        "path": "thoughts/a.mp4",
        "source": "generated",
        "generator": "some-model@1",
        "provenance": {"seed": 3},
    },
    "split": "train",
    "meta": {"task": "fall", "nested": [1, {"x": None}]},
}


def write_lines(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def row(**changes: Any) -> Row:
    return Row.model_validate({**FULL, **changes})


def test_reading_resolves_paths_against_the_folder_of_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "rows.jsonl", FULL, "", {**FULL, "id": "b", "video": "/else/b.mp4"})
    monkeypatch.chdir(tmp_path)  # a relative name of the file itself must work as well
    first, second = read_rows("set/rows.jsonl")
    assert first.video == str(folder / "clips/a.mp4")
    assert first.thought_video is not None
    assert first.thought_video.path == str(folder / "thoughts/a.mp4")
    assert second.video == "/else/b.mp4"
    assert (first.end, first.options, first.keyframes) == (4.0, ("left", "right"), (1.5, 2.25))


def test_round_trip_keeps_every_field_and_survives_a_move(tmp_path):
    (tmp_path / "old").mkdir()
    rows = [
        row(video=str(tmp_path / "old/clips/a.mp4")),
        row(id="b", video="/else/b.mp4", thought_video=None, start=None, end=None, plan=None),
        row(id="c", options=[], answer="it does not"),
    ]
    write_rows(tmp_path / "old/rows.jsonl", rows)
    written = [json.loads(line) for line in (tmp_path / "old/rows.jsonl").read_text().splitlines()]
    assert written[0] == FULL
    assert written[1]["video"] == "/else/b.mp4"

    (tmp_path / "old").rename(tmp_path / "new")
    moved = read_rows(tmp_path / "new/rows.jsonl")
    assert moved[0].video == str(tmp_path / "new/clips/a.mp4")
    write_rows(tmp_path / "new/again.jsonl", moved)
    assert read_rows(tmp_path / "new/again.jsonl") == moved
    assert (tmp_path / "new/again.jsonl").read_bytes() == (tmp_path / "new/rows.jsonl").read_bytes()


def test_a_neighbouring_folder_with_the_same_prefix_is_not_beneath(tmp_path):
    (tmp_path / "set").mkdir()
    outside = str(tmp_path / "set-2/a.mp4")
    write_rows(tmp_path / "set/rows.jsonl", [row(video=outside)])
    assert read_rows(tmp_path / "set/rows.jsonl")[0].video == outside


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row()])
    before = path.read_bytes()

    def breaks():
        yield row(id="x")
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError, match="source failed"):
        write_rows(path, breaks())
    with pytest.raises(ValueError):
        write_rows(path, [row(meta={"score": float("nan")})])
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"answer": "up"}, "answer"),
        ({"answer": " "}, "answer"),
        ({"question": "\n"}, "question"),
        ({"options": ["right", "right"]}, "options"),
        ({"start": 4.0}, "start"),
        ({"start": -1}, "start"),
        ({"end": "soon"}, "end"),
        ({"keyframes": [-0.5]}, r"keyframes\.0"),
        ({"split": "dev"}, "split"),
        ({"version": 2}, "version"),
        ({"vidoe": "a.mp4"}, "vidoe"),
        ({"id": None}, "id"),
        ({"thought_video": {"path": "a", "source": "dreamt", "generator": "g"}}, "thought_video.s"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(tmp_path, changes, field):
    path = write_lines(tmp_path / "rows.jsonl", FULL, "", {**FULL, "id": "z", **changes})
    with pytest.raises(RowError, match=rf"rows\.jsonl:3: .*{field}"):
        read_rows(path)


@pytest.mark.parametrize("line", ['{"id": "a"', "[]", "null", '{"id": NaN}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    with pytest.raises(RowError, match=r"rows\.jsonl:2: "):
        read_rows(write_lines(tmp_path / "rows.jsonl", FULL, line))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(FULL).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(RowError, match=r"rows\.jsonl:2: "):
        read_rows(path)


def test_a_repeated_id_is_named_with_both_lines(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", FULL, {**FULL, "id": "b"}, FULL)
    with pytest.raises(RowError, match=r"rows\.jsonl:3: id: 'a-1' is taken by line 1"):
        read_rows(path)


def test_rows_are_frozen_and_infinity_is_refused():
    with pytest.raises(ValidationError, match="frozen"):
        row().answer = "left"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="end"):
        row(end=float("inf"))
    assert ThoughtVideo(path="a", source="oracle", generator="g").provenance == {}


def test_home_and_addresses_are_no_relative_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ["~/a.mp4", "https://example.org/a.mp4", "file:///a.mp4"]
    rows = [{**FULL, "id": name, "video": name} for name in names]
    read = read_rows(write_lines(tmp_path / "rows.jsonl", *rows))
    assert [row.video for row in read] == ["/home/me/a.mp4", *names[1:]]
