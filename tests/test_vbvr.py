"""VBVR's samples as their generators wrote them (see `vbvr/README.md`); others are made in their shape."""

import gzip
import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from command_line import run_storm

from storm_vlm.construction.build import run
from storm_vlm.construction.config import BuildConfig
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.data.video import read_video, write_video
from storm_vlm.datasets import vbvr
from storm_vlm.datasets.leaks import find_leaks
from storm_vlm.datasets.transfer import Counts, import_rows
from storm_vlm.datasets.vbvr import Vbvr, shortest_ways
from storm_vlm.errors import StormError

SAMPLES = Path(__file__).parent / "vbvr"
# As checked against the pixels of the final frames, or of the video.
MOVES = {
    0: (6, 7, 8, 12, 11, 15),
    1: (2, 6, 5, 9, 13, 14, 10, 11, 15),
    2: (7, 4, 3, 2, 1, 5, 9, 10, 6, 7, 8, 12),
    3: (6, 1, 2, 7, 12, 13, 14, 15, 20),
    4: (8, 6, 3, 5, 2, 3, 6),
    5: (1, 4, 5, 8),
}
LAST_FALLEN = {0: 3, 1: 5, 2: 2, 3: 4, 4: 9, 5: 5}
SHELVED = {0: (2, 1), 4: (1, 2), 5: (1, 2)}  # the others are ambiguous, or nearly so
ORDINALS = ("first", "second", "third", "fourth")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples, with an empty file for each video that is not at hand."""
    folder = tmp_path_factory.mktemp("vbvr") / "samples"
    shutil.copytree(SAMPLES, folder)
    for metadata in folder.rglob("metadata.json"):
        metadata.with_name("ground_truth.mp4").touch()
    return folder


def imported(source: Path, out: Path, **options: Any) -> tuple[list[Row], Counts]:
    counts = import_rows("vbvr", source, out / "rows.jsonl", **options)
    return (read_rows(out / "rows.jsonl") if counts.written else []), counts


def index(row: Row) -> int:
    assert row.thought_video
    return row.thought_video.provenance["index"]


def test_answers_are_those_of_the_videos(whole: Path, tmp_path: Path) -> None:
    rows, counts = imported(whole, tmp_path)
    assert Counter(row.meta["family"] for row in rows) == {
        "sliding_move": 6, "sliding_blank": 6, "domino_last": 6, "bookshelf_2": 3
    }  # fmt: skip
    assert counts.skipped.total() == 3 and not counts.rejected
    for row in rows:
        match row.meta["family"]:
            case "sliding_move":
                moves = MOVES[index(row)]
                assert row.answer == f"tile {moves[row.meta['steps'] - 1]}"
                assert f"exactly {len(moves)} moves" in row.question
                assert row.plan == f"The tiles that slide, in order: {', '.join(map(str, moves))}."
            case "domino_last":
                assert row.answer == str(LAST_FALLEN[index(row)])
            case "bookshelf_2":
                gap = next(i for i, name in enumerate(ORDINALS) if f"{name} gap" in row.question)
                assert row.answer == f"the {ORDINALS[SHELVED[index(row)][gap] - 1]}"
        assert row.end and row.keyframes and row.keyframes[0] < row.end
        thought = row.thought_video
        assert thought and (thought.path, thought.start, thought.end) == (row.video, row.end, None)
        assert thought.source == "oracle" and len(thought.provenance["commit"]) == 40
        if row.meta["family"] != "sliding_blank":  # its cells have numbers of their own
            assert row.answer not in row.question.split()


def test_the_empty_square_is_where_the_video_shows_it(tmp_path: Path) -> None:
    (folder,) = SAMPLES.rglob("sliding_puzzle_00000005")
    rows, _ = imported(folder, tmp_path)
    (row,) = (row for row in rows if row.meta["family"] == "sliding_blank")
    k = row.meta["steps"]
    frame = read_video(row.video, 1, (5 + 6 * k - 1) / 16, (5 + 6 * k - 0.5) / 16).frames[0]
    cells = frame[4:1020, 4:1020].astype(float)
    emptiest = min(
        ((r, c) for r in range(3) for c in range(3)),
        key=lambda cell: cells[cell[0] * 338 + 60 :, cell[1] * 338 + 60 :][:218, :218].std(),
    )
    assert row.answer == f"row {emptiest[0] + 1}, column {emptiest[1] + 1}"
    assert read_video(row.video, 9, row.start, row.end).frames.shape[0] == 2  # the still, twice


def test_only_one_shortest_way_will_do() -> None:
    goal = (1, 2, 3, 4, 5, 6, 7, 8, 0)
    assert shortest_ways((1, 2, 3, 4, 5, 6, 0, 7, 8), goal, 3) == [(7, 8)]
    around = (0, 1, 3, 4, 2, 5, 7, 8, 6)
    (way,) = shortest_ways(around, goal, 3)
    assert way == (1, 2, 5, 6)
    assert shortest_ways((1, 2, 3, 0), (0, 3, 2, 1), 2)[1:]  # half-way round, either way


@pytest.mark.parametrize("layout", ["older name", "pro", "tar", "table", "one sample"])
def test_every_published_layout_is_read(layout: str, whole: Path, tmp_path: Path) -> None:
    (sample,) = whole.rglob("domino_chain_gap_analysis_00000003")
    folder = tmp_path / "data" / sample.relative_to(whole)
    shutil.copytree(sample, folder)
    source, options = tmp_path / "data", {}
    if layout == "older name":
        (folder / "metadata.json").rename(folder / "question_metadata.json")
    elif layout == "pro":
        (folder / "video").mkdir()
        for name in ("prompt.txt", "ground_truth.mp4"):
            (folder / name).rename(folder / "video" / name)
    elif layout == "tar":
        source, options = tmp_path / "a_00000-00001.tar.gz", {"videos": tmp_path / "media"}
        with tarfile.open(source, "w:gz") as tar:
            tar.add(tmp_path / "data", ".")
    elif layout == "table":
        source, options = tmp_path / "metadata.json.jsonl", {"videos": tmp_path / "data"}
        name = (folder / "ground_truth.mp4").relative_to(tmp_path / "data").as_posix()
        line = {"id": 1, "generator": "O-24_domino_chain_gap_analysis_data-generator"}
        line |= {"prompt": "…", "ground_truth_video_path": name}
        line["metadata_json"] = (folder / "metadata.json").read_text()
        source.write_text(json.dumps(line) + "\n")
        import pyarrow
        import pyarrow.parquet

        table = tmp_path / "metadata.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([line]), table)
        ((again,), _) = imported(table, tmp_path, **options)
        assert again == imported(source, tmp_path, **options)[0][0]
    else:
        source = folder / "metadata.json"
        options = {"videos": tmp_path}
    (row,), _ = imported(source, tmp_path, **options)
    assert row.answer == "4" and row.meta["task"] == "domino_chain_gap_analysis"
    assert Path(row.video).is_file() and row.meta["prompt"] and row.id.startswith("vbvr-domino_")


def test_what_is_no_question_is_counted(whole: Path, tmp_path: Path) -> None:
    (sample,) = whole.rglob("domino_chain_gap_analysis_00000003")
    bench = tmp_path / "data" / "In-Domain_50" / "G-1_colours_data-generator" / "00000"
    shutil.copytree(sample, bench)
    (bench / "metadata.json").unlink()
    other = tmp_path / "data" / "x_task" / "x_00000000"
    shutil.copytree(sample, other)
    about = json.loads((other / "metadata.json").read_text()) | {"generator": "x"}
    (other / "metadata.json").write_text(json.dumps(about))
    _, counts = imported(tmp_path / "data", tmp_path)
    assert counts.skipped == {
        "sample without metadata: nothing tells its answer": 1,
        "no questions about the task x": 1,
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(StormError, match=r"no folder with a metadata\.json"):
        imported(tmp_path / "empty", tmp_path)
    (tmp_path / "half.tar").write_bytes(b"no tar")
    with pytest.raises(StormError, match="not a whole tar"):
        imported(tmp_path / "half.tar", tmp_path, videos=tmp_path)
    with pytest.raises(StormError, match="--videos"):
        imported(tmp_path / "half.tar", tmp_path)


def copied(whole: Path, folder: Path, name: str = "domino_chain_gap_analysis_00000003") -> Path:
    (sample,) = whole.rglob(name)
    shutil.copytree(sample, folder)
    return folder


def test_odd_folders_are_read_and_broken_samples_counted(whole: Path, tmp_path: Path) -> None:
    """Whatever is wrong with a sample, the others are rows; nothing ends the import."""
    data = tmp_path / "data"
    copied(whole, data / "deep" / "deeper" / "日本語 name" / "0")
    filmed = copied(whole, data / "b", "domino_chain_gap_analysis_00000002")
    for file in (filmed / "ground_truth.mp4", filmed / "video.mov"):
        write_video(file, np.full((6, 16, 16, 3), 90, np.uint8), 10.0)
    (filmed / "ground_truth.mp4").unlink()
    for number, (name, content) in enumerate(
        {
            "metadata.json": b"",
            "prompt.txt": b"\xff" + b"a" * 100_000,
            "ground_truth.mp4": b"no video",
            "unseen": b"",
        }.items()
    ):
        folder = copied(
            whole, data / f"c{number}", f"domino_chain_gap_analysis_0000000{number % 2}"
        )
        (folder / name).write_bytes(content)
    (data / "c3" / "ground_truth.mp4").unlink()
    about = json.loads((filmed / "metadata.json").read_text())
    for number, change in enumerate(
        ({"parameters": {"size": 3}}, {"parameters": [1]}, {"generator": "Multi-09_hanoi"})
    ):
        change |= {"param_hash": str(number)}
        folder = copied(whole, data / f"d{number}")
        (folder / "metadata.json").write_text(json.dumps(about | change))
    copied(whole, data / "e")  # the same again
    (data / "metadata.json").write_text('{"about": "all",\n "nan": NaN}')
    (data / "._metadata.json").write_bytes(b"\0\5\x16\7")
    (data / "around").symlink_to(data)
    (data / "picture").mkdir()
    (data / "picture" / "ground_truth.png").touch()
    (data / "picture" / "metadata.json").write_text(json.dumps(about | {"param_hash": "picture"}))
    rows, counts = imported(data, tmp_path)
    assert {Path(row.video).parent.name for row in rows} == {"b", "c1", "0"}
    (ten,) = (row for row in rows if Path(row.video).name == "video.mov")
    assert ten.end == pytest.approx(0.15) and ten.keyframes == pytest.approx((0.1,))  # 10 a second
    (long,) = (row for row in rows if "/c1/" in row.video)
    assert len(long.meta["prompt"]) > 99_999
    assert counts.skipped == {
        "the same sample again": 1,
        "sample without a video": 1,
        "sample without metadata: nothing tells its answer": 1,
        "no questions about the task hanoi": 1,
    }, counts.skipped
    assert counts.rejected == {
        "part of the source that cannot be read": 1,
        "parameters that domino_chain_gap_analysis is not known to have": 1,
        "metadata without parameters": 1,
        "a picture where a video should be": 1,
        str(data / "c2" / "ground_truth.mp4"): 1,
    }, counts.rejected


@pytest.mark.parametrize("layout", ["list", "dict of lists", "dict by id", "lines"])
def test_metadata_of_many_samples_in_one_file(layout: str, whole: Path, tmp_path: Path) -> None:
    about = [
        json.loads(file.read_text()) | {"video": f"clips/{file.parent.name}.mp4"}
        for file in sorted(whole.rglob("domino*/metadata.json"))
    ]
    texts = {
        "list": json.dumps(about, indent=1),
        "dict of lists": json.dumps({"data": about}, indent=1),
        "dict by id": json.dumps({sample["task_id"]: sample for sample in about}),
        "lines": "\n".join(map(json.dumps, about)),
    }
    (tmp_path / "all.json").write_text(texts[layout])
    rows, _ = imported(tmp_path / "all.json", tmp_path, videos=tmp_path)
    assert [row.answer for row in rows] == [str(LAST_FALLEN[i]) for i in range(6)]


def test_tars_that_must_not_be_trusted_or_are_not_whole(whole: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    packed = [tmp_path / "data" / f"a_0000{i}.tar.gz" for i in range(2)]
    packed[0].parent.mkdir()
    for number, file in enumerate(packed):  # both hold the same folders, as the published chunks do
        with tarfile.open(file, "w:gz") as tar:
            folder = copied(
                whole, tmp_path / str(number), f"domino_chain_gap_analysis_0000000{number}"
            )
            tar.add(folder, f"O-24_x_data-generator/x_task/x_{number}")
            link = tarfile.TarInfo("O-24_x_data-generator/link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    rows, counts = imported(tmp_path / "data", tmp_path, videos=media)
    assert [row.answer for row in rows] == ["3", "5"] and not counts.skipped
    assert not (media / "O-24_x_data-generator" / "link").is_symlink()
    whole_bytes = packed[0].read_bytes()
    plain = gzip.decompress(whole_bytes)
    for bad in (
        whole_bytes[: len(whole_bytes) // 2],
        b"",
        whole_bytes[:400] + b"\1" * 400,
        plain[:1124],
        plain[:7000],
    ):
        packed[0].write_bytes(bad)
        with pytest.raises(StormError, match=r"a_00000\.tar\.gz: not a whole tar"):
            imported(packed[0], tmp_path, videos=tmp_path / "other")
    with tarfile.open(packed[0], "w") as tar:
        tar.add(whole / "README.md", "../outside.md")
    with pytest.raises(StormError, match="do not trust it"):
        imported(packed[0], tmp_path, videos=media)
    assert not (tmp_path / "outside.md").exists()


def test_two_imports_into_one_file_are_not_mixed(whole: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from storm_vlm.data.output import locked\n"
    code += "with locked(Path(sys.argv[1]), 'rows.jsonl'): print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=pipe, stdout=pipe) as first:
        assert first.stdout and first.stdout.readline()
        with pytest.raises(StormError, match=r"another process is at work on rows\.jsonl"):
            imported(whole, tmp_path)
        first.communicate()
    assert imported(whole, tmp_path)[0]


def test_a_puzzle_of_many_moves_takes_no_long_search(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Mock(wraps=vbvr._moved)
    monkeypatch.setattr(vbvr, "_moved", moved)
    far = (*range(15, 0, -1), 0)
    assert shortest_ways(far, (*range(1, 16), 0), 4) == []
    assert moved.call_count < 100_000  # boards looked at


def item(task: str, number: int, parameters: dict[str, Any]) -> dict[str, Any]:
    name = f"{task}_{number:08}"
    metadata = {"task_id": name, "generator": task, "parameters": parameters}
    return {"folder": f"/x/{name}", "files": ["ground_truth.mp4"], "metadata": metadata}


def dots(rng: random.Random) -> dict[str, Any]:
    places = [[rng.randint(40, 980), rng.randint(40, 980)] for _ in range(rng.randint(4, 8))]
    return {"objects": [{"number": i, "center": p} for i, p in enumerate(places, 1)]}


def circles(rng: random.Random) -> dict[str, Any]:
    from storm_vlm.datasets.vbvr import COLOURS

    made = [
        {
            "radius": 100 - 9 * i,
            "color": list(rng.choice(list(COLOURS))),
            "initial_position": [rng.randint(100, 900), 0],
            "final_position": [100 + 150 * i, 512],
        }
        for i in range(6)
    ]
    return {"circles": rng.sample(made, 6)}


def symbols(rng: random.Random) -> dict[str, Any]:
    place, count = rng.randint(0, 5), rng.randint(7, 9)
    named = [(rng.choice("●▲■◆★"), rng.choice(["red", "blue", "teal"])) for _ in range(count)]
    things = [
        {"slot_index": i, "symbol_char": c, "color_name": n, "is_inserted": i == place}
        for i, (c, n) in enumerate(named)
    ]
    return {"insert_position": place, "objects": things}


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("dot_to_dot", dots),
        ("arrange_circles_by_circumference", circles),
        ("symbol_insert", symbols),
    ],
)
def test_answers_and_their_places_are_balanced(task: str, make: Any) -> None:
    from storm_vlm.datasets.parse import Skipped
    from storm_vlm.datasets.shortcuts import Shortcuts

    rng, maker, shortcuts = random.Random(0), Vbvr(), Shortcuts()
    places: Counter[int] = Counter()
    answers: Counter[str] = Counter()
    for number in range(400):
        try:
            (fields,) = maker(item(task, number, make(rng)))
        except Skipped:
            continue
        row = Row.model_validate(fields | {"split": "train"})
        shortcuts.add(row)
        if len(row.options) == 4:
            places[row.options.index(row.answer)] += 1
            answers[row.answer] += 1
    assert max(places.values()) - min(places.values()) <= 1 and sum(places.values()) > 100
    if task != "symbol_insert":
        assert max(answers.values()) < 1.25 * min(answers.values()) + 3
    ((rows, shares),) = shortcuts.accuracies().values()
    assert rows >= sum(places.values()) and shares["text only"] < shares["chance"] + 0.1


def test_crossings_circles_and_symbols() -> None:
    maker = Vbvr()
    cross = [[0, 0], [100, 100], [100, 0], [0, 100]]
    made = {"objects": [{"number": i, "center": p} for i, p in enumerate(cross, 1)]}
    (fields,) = maker(item("dot_to_dot", 0, made))
    assert fields["answer"] == "1" and fields["meta"]["steps"] == 3
    bowl = {"objects": [{"number": i, "center": p} for i, p in enumerate(sorted(cross), 1)]}
    assert maker(item("dot_to_dot", 1, bowl))[0]["answer"] == "0"
    rng = random.Random(1)
    for number in range(20):
        about = symbols(rng)
        about["objects"][-1]["color_name"] = "gold"  # there is one that occurs once
        (fields,) = maker(item("symbol_insert", number, about))
        position = int(fields["question"].split("at position ")[-1].split()[0])
        thing = about["objects"][position - 1]
        assert fields["answer"] == f"{thing['color_name']} {thing['symbol_char']}"
        assert position > about["insert_position"] + 1


def test_the_command_prints_shortcuts(whole: Path, tmp_path: Path) -> None:
    result = run_storm("import", "vbvr", str(whole), str(tmp_path / "rows.jsonl"))
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "domino_last: 6 rows; right by chance 25%" in said
    assert "before the widest gap 100%" in said and "text only" in said


def test_filters_keep_the_sound_and_catch_the_broken(tmp_path: Path) -> None:
    """Rows of real samples, and their thought videos spoiled in four ways."""
    rows = [
        row
        for number, name in enumerate(
            ("sliding_puzzle_00000005", "domino_chain_gap_analysis_00000002")
        )
        for row in imported(next(SAMPLES.rglob(name)), tmp_path / str(number))[0]
    ]
    assert len(rows) == 3
    spoiled: list[Row] = []
    for row in rows[1:]:
        thought = row.thought_video
        assert thought and row.end
        frames = read_video(row.video, 24, row.end, None, 256).frames
        dark = frames.copy()
        dark[1::2] //= 3
        other = 255 - frames
        broken = {
            "blank": frames // 64 + 120,
            "frozen": frames[[0] * 24],
            "flicker": dark,
            "mismatch": other,
        }
        for name, made in broken.items():
            path = tmp_path / f"{name}-{row.id}.mp4"
            write_video(path, np.ascontiguousarray(made), 16)
            fields = {"path": str(path), "source": "generated", "start": None}
            bad = thought.model_copy(update=fields)
            spoiled.append(row.model_copy(update={"id": f"{name} {row.id}", "thought_video": bad}))
    write_rows(tmp_path / "rows.jsonl", rows + spoiled)
    config = BuildConfig.model_validate({"steps": ["filter"], "generator": "keyframes"})
    run(tmp_path / "rows.jsonl", tmp_path / "out", config)
    assert [row.id for row in read_rows(tmp_path / "out" / "rows.jsonl")] == [
        row.id for row in rows
    ]
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [row.id.split()[0] for row in spoiled]


def test_clips_of_one_name_are_no_leaks(tmp_path: Path) -> None:
    """`ground_truth.mp4` is every clip's name; two puzzles with other numbers look alike, and a copy is a copy."""
    (puzzle,) = SAMPLES.rglob("sliding_puzzle_00000005/ground_truth.mp4")
    (domino,) = SAMPLES.rglob("domino_chain_gap_analysis_00000002/ground_truth.mp4")
    frames = read_video(puzzle, 34, max_side=512).frames
    swapped = frames.copy()  # two tiles of the middle column, in all frames
    swapped[:, 180:330, 350:500], swapped[:, 350:500, 350:500] = (
        frames[:, 350:500, 350:500],
        frames[:, 180:330, 350:500],
    )
    for name, made in (("swapped", swapped), ("copy", frames)):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "ground_truth.mp4", made, 16, crf=30)

    def row(path: Path) -> Row:
        fields = {"id": str(path), "video": str(path), "question": "?", "answer": "a"}
        return Row.model_validate(fields | {"split": "train"})

    train = [row(puzzle), row(domino)]
    found = find_leaks(
        train, [row(tmp_path / "swapped" / "ground_truth.mp4")], tmp_path / "cache", 0
    )
    assert found.generic == 2 and not found.leaks
    evaluation = [row(tmp_path / name / "ground_truth.mp4") for name in ("swapped", "copy")]
    found = find_leaks(train, evaluation, tmp_path / "cache")
    (leak,), (alike,) = found.leaks, found.look_alikes
    assert leak.train == alike.train == str(puzzle)
    assert "copy" in leak.evaluation and leak.why == ("frames",)
    assert "swapped" in alike.evaluation and alike.why == ()
