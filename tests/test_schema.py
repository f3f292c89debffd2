import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from storm_vlm.data import json_objects
from storm_vlm.data.json_objects import JSONError, read_objects
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
    "slots": 5,
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
        write_rows(path, [row().model_copy(update={"meta": {"score": float("nan")}})])
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
        ({"slots": 0}, "slots"),
        ({"slots": "3"}, "slots"),
        ({"version": 2}, "version"),
        ({"video": "a\0.mp4"}, "video: no file's name has a zero byte"),
        ({"vidoe": "a.mp4"}, "vidoe"),
        ({"id": None}, "id"),
        ({"start": "1.0"}, "start"),
        ({"start": True}, "start"),
        ({"start": float("nan")}, "start"),  # no silent beginning of the clip
        ({"end": float("inf")}, "end"),
        ({"meta": {"score": [float("inf")]}}, "meta: .*infinite"),
        ({"duration": 3}, "duration: .*put your own into meta"),
        ({"thought_video": {"path": "a", "source": "dreamt", "generator": "g"}}, "thought_video.s"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(tmp_path, changes, field):
    path = write_lines(tmp_path / "rows.jsonl", FULL, "", {**FULL, "id": "z", **changes})
    with pytest.raises(RowError, match=rf"rows\.jsonl:3: .*{field}"):
        read_rows(path)


@pytest.mark.parametrize("line", ['{"id": "a"', "[]", "null", '{"id": NaN}', '{"end": Infinity}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    with pytest.raises((RowError, JSONError), match=r"rows\.jsonl:2: "):
        read_rows(write_lines(tmp_path / "rows.jsonl", FULL, line))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 50_000, '"\\ud800"', "{} {}"])
def test_json_that_is_none_is_one_sentence(tmp_path, text):
    for file in ("rows.jsonl", "rows.json"):
        (tmp_path / file).write_text(text if file == "rows.jsonl" else f"[{text}]")
        with pytest.raises(JSONError, match=rf"{file}.*: not JSON \(.*\): mend it"):
            list(read_objects(tmp_path / file))


def test_rows_as_other_programs_write_them(tmp_path):
    """A byte order mark, a list, line ends of other systems, null and NaN for what is missing."""
    path, (wanted,) = tmp_path / "rows.jsonl", [row(plan=None, start=None, meta={"score": None})]
    loose = {**FULL, "plan": None, "start": None, "meta": {"score": float("nan")}}
    other = {**loose, "id": "b", "keyframes": None, "options": None, "meta": None}
    for text in (
        f"{json.dumps(loose)}\n\n{json.dumps(other)}",
        f"{json.dumps(loose)}\r\n{json.dumps(other)}\r\n",
        f"{json.dumps(loose)}\r{json.dumps(other)}",
        json.dumps([loose, other]),
        json.dumps([loose, other], indent=2),
    ):
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_bytes(text.encode(encoding))
            first, second = read_rows(path)
            assert first.model_copy(update={"video": "", "thought_video": None}) == (
                wanted.model_copy(update={"video": "", "thought_video": None})
            )
            assert (second.keyframes, second.options, second.meta) == ((), (), {})


def test_members_of_a_list_are_read_as_json_reads_it_wherever_a_chunk_ends(tmp_path, monkeypatch):
    value = [{"a": [1, {"é": "]"}]}, 12, -3.5e7, "x,]", None, [], {}, True]
    for text in (json.dumps(value), json.dumps(value, indent=3), " [ ] ", "[]\n"):
        (tmp_path / "a.json").write_text(text)
        for chunk in range(3, 40):  # the first one holds the bracket
            monkeypatch.setattr(json_objects, "_CHUNK", chunk)
            members = [member for _, member in read_objects(tmp_path / "a.json")]
            assert members == json.loads(text)
    for broken in ("[1 2]", "[1,", "[", "[1] 2", "[{]"):
        (tmp_path / "a.json").write_text(broken)
        with pytest.raises(JSONError, match=r"a\.json: .*not JSON"):
            list(read_objects(tmp_path / "a.json"))


def test_labels_come_off_options_and_answer():
    labelled = row(options=["A. left", "B. right"], answer="B. right")
    assert labelled == row(options=["A. left", "B. right"], answer="right") == row()
    assert row(options=["A.M.", "P.M."], answer="P.M.").options == ("A.M.", "P.M.")
    with pytest.raises(ValidationError, match="distinct"):
        row(options=["A. left", "B. left"], answer="left")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(FULL).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(RowError, match=r"rows\.jsonl:2: not UTF-8"):
        read_rows(path)
    path.write_bytes(json.dumps(FULL).encode("utf-16"))
    with pytest.raises(JSONError, match=r"rows\.jsonl:1: not UTF-8"):
        read_rows(path)


def test_a_repeated_id_is_named_with_both_lines(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", FULL, {**FULL, "id": "b"}, FULL)
    with pytest.raises(RowError, match=r"rows\.jsonl:3: id: 'a-1' is taken by .*rows.jsonl:1;"):
        read_rows(path)


def test_rows_are_frozen_and_infinity_is_refused():
    with pytest.raises(ValidationError, match="frozen"):
        row().answer = "left"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="end"):
        row(end=float("inf"))
    assert ThoughtVideo(path="a", source="oracle", generator="g").provenance == {}


def test_home_and_addresses_are_no_relative_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = {
        "~/a.mp4": "/home/me/a.mp4",
        "https://example.org/a.mp4": "https://example.org/a.mp4",
        "file:///a%20b.mp4": "/a b.mp4",
        "file://localhost/a.mp4": "/a.mp4",
    }
    rows = [{**FULL, "id": name, "video": name} for name in names]
    read = read_rows(write_lines(tmp_path / "rows.jsonl", *rows))
    assert [row.video for row in read] == list(names.values())


THOUGHT = FULL["thought_video"]


def test_a_thought_video_may_be_a_stretch_of_a_file(tmp_path):
    stretch = row(thought_video=THOUGHT | {"start": 4, "end": 9.5})
    write_rows(tmp_path / "rows.jsonl", [stretch])
    (again,) = read_rows(tmp_path / "rows.jsonl")
    assert again.thought_video and (again.thought_video.start, again.thought_video.end) == (4, 9.5)
    assert row().model_dump()["thought_video"] == THOUGHT  # as before there were stretches
    with pytest.raises(ValidationError, match="must be less than end"):
        row(thought_video=THOUGHT | {"start": 4, "end": 4})


@pytest.mark.parametrize(
    ("window", "thought", "leaks"),
    [
        ((None, None), (None, None), True),
        ((None, None), (4, None), True),  # the clip is the whole file
        ((None, 4), (1, 4), True),
        ((1, 4), (2, 3), True),
        ((None, 4), (4, None), False),
        ((None, 4), (3, 9), False),  # begins with what is seen, as generated ones do
        ((None, 4), (None, None), False),  # as rows have it from before there were stretches
        ((2, None), (0, 2), False),  # what came before
    ],
)
def test_a_thought_video_shows_more_than_the_clip(window, thought, leaks):
    fields = dict(zip(("start", "end"), window, strict=True), keyframes=[])
    stretch = dict(zip(("start", "end"), thought, strict=True), path="./clips/x/../a.mp4")
    if leaks:
        with pytest.raises(ValidationError, match="within the clip that is seen"):
            row(**fields, thought_video=THOUGHT | stretch)
    else:
        row(**fields, thought_video=THOUGHT | stretch)
    row(**fields, thought_video=THOUGHT | stretch | {"path": "clips/b.mp4"})


def test_keyframes_of_the_unseen_part_are_a_leak(tmp_path):
    row(keyframes=[1, 4])
    lines = write_lines(tmp_path / "rows.jsonl", {**FULL, "keyframes": [2, 4.5]})
    with pytest.raises(RowError, match=r"rows.jsonl:1: .*\[4.5\] s come after the clip's end"):
        read_rows(lines)
