"""Copies of clips are found, other clips of the micro world (which all show the same board) are not."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import run_storm

from storm_vlm.data.frame_hash import distances, frame_hashes
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.data.video import read_video, write_video
from storm_vlm.datasets.leaks import ALIKE, find_leaks, names, without_leaks


def row(video: Path | str, **changes: object) -> Row:
    fields = {
        "id": Path(video).stem,
        "video": str(video),
        "question": "?",
        "answer": "a",
        "split": "train",
    }
    return Row.model_validate(fields | changes)


def resized(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    return np.stack(
        [np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames]
    )


@pytest.fixture(scope="module")
def frames(reasoning_rows: list[Row]) -> list[np.ndarray]:
    return [read_video(row.video, 32).frames for row in reasoning_rows]


COPIES = {
    "encoded badly": lambda f: (f, 38),
    "small": lambda f: (resized(f, 64, 64), 28),
    "large and wide": lambda f: (resized(f, 180, 320), 28),
    "reversed": lambda f: (f[::-1], 23),
    "second half": lambda f: (f[len(f) // 2 :], 23),
    "darker": lambda f: ((f * 0.7).astype(np.uint8), 23),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found_and_other_clips_are_not(tmp_path, reasoning_rows, frames, copy):
    changed, crf = COPIES[copy](frames[5])
    write_video(tmp_path / "other name.mp4", changed, 7, crf=crf)
    found = find_leaks(reasoning_rows, [row(tmp_path / "other name.mp4")], tmp_path / "cache")
    (leak,) = found.leaks
    assert leak.train_rows == (reasoning_rows[5].id,) and leak.why == ("frames",)
    assert leak.distance is not None and leak.distance <= ALIKE and leak.share >= 0.5
    assert len(list(without_leaks(reasoning_rows, found))) == len(reasoning_rows) - 1


def test_a_cut_and_a_joined_video_are_found(tmp_path, frames):
    write_video(tmp_path / "long one.mp4", np.concatenate(frames), 4)
    start = sum(len(f) for f in frames[:4])
    write_video(tmp_path / "cut.mp4", np.concatenate(frames)[start + 2 : start + 17], 4, crf=30)
    write_video(tmp_path / "joined.mp4", np.concatenate([frames[0], frames[9]]), 4, crf=30)
    evaluation = [row(tmp_path / name) for name in ("cut.mp4", "joined.mp4")]
    found = find_leaks([row(tmp_path / "long one.mp4")], evaluation, tmp_path / "cache")
    assert {leak.evaluation_rows for leak in found.leaks} == {("cut",), ("joined",)}
    window = row(tmp_path / "long one.mp4", start=0, end=(start - 1) / 4)  # ends before the cut
    again = find_leaks([window], evaluation[:1], tmp_path / "cache")
    assert not again.leaks


def test_clips_of_the_micro_world_are_told_apart(frames):
    """The nearest frames of two different clips stay farther apart than any frame and its copy."""
    hashes = [frame_hashes(f) for f in frames]
    apart = [distances(a, b).min() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert len(apart) == 66 and min(apart) > ALIKE + 0.05
    same = [
        np.diag(distances(frame_hashes(resized(f, 96, 96)), h))
        for f, h in zip(frames, hashes, strict=True)
    ]
    assert max(d.max() for d in same) < ALIKE - 0.05


def test_frames_without_structure_are_like_nothing():
    flat = np.stack([np.full((48, 64, 3), grey, np.uint8) for grey in (0, 128, 255)])
    noise = np.random.default_rng(0).integers(0, 2, flat.shape, np.uint8)  # what an encoder leaves
    assert (distances(frame_hashes(flat), frame_hashes(flat + noise * (flat < 255))) == 1).all()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/d/ytb_dQw4w9WgXcQ.mp4", {"dQw4w9WgXcQ"}),
        ("/d/v_QOlSCBRmfWY.mkv", {"QOlSCBRmfWY"}),
        ("1034419625_reverse.mp4", {"1034419625"}),
        ("1034419625_concat_2.mp4", {"1034419625"}),
        ("1034419625_1034419626_1007613931.mp4", {"1034419625", "1034419626", "1007613931"}),
        ("ZS9XR.mp4", {"ZS9XR"}),
        ("a_reverse_b.mp4", {"a_reverse_b"}),
        ("clevrer/video_10009.mp4", set()),
        ("videos/Art/0.mp4", set()),
        ("clip.mp4", set()),
    ],
)
def test_names(path, expected):
    assert names(path) == expected


def test_names_match_without_files_and_unreadable_ones_are_reported(tmp_path):
    train = [
        row("/x/ytb_dQw4w9WgXcQ.mp4"),
        row("/x/ytb_dQw4w9WgXcQ.mp4", id="second"),
        row("/x/0.mp4"),
    ]
    evaluation = [row("/y/dQw4w9WgXcQ.mkv"), row("/y/0.mp4", id="y0")]
    found = find_leaks(train, evaluation, tmp_path / "cache")
    (leak,) = found.leaks
    assert leak.why == ("name",) and leak.train_rows == ("ytb_dQw4w9WgXcQ", "second")
    assert len(found.unreadable) == 4 and "no such video file" in found.unreadable["/x/0.mp4"]
    assert found.generic == 2
    (same,) = find_leaks([row("/x/0.mp4")], [row("/x/../x/0.mp4")], tmp_path / "cache").leaks
    assert same.why == ("file",)


def test_hashes_are_kept_until_the_file_changes(tmp_path, frames):
    video, cache = tmp_path / "clip of mine.mp4", tmp_path / "deep/cache"
    write_video(video, frames[0], 4)
    write_video(tmp_path / "eval one.mp4", frames[0], 4, crf=30)
    first = find_leaks([row(video)], [row(tmp_path / "eval one.mp4")], cache)
    state = os.stat(video)
    video.write_bytes(bytes(state.st_size))  # what is kept does not need the file …
    os.utime(video, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert find_leaks([row(video)], [row(tmp_path / "eval one.mp4")], cache) == first
    os.utime(video, ns=(state.st_atime_ns, time.time_ns()))  # … until that is another one
    assert list(find_leaks([row(video)], [row(tmp_path / "eval one.mp4")], cache).unreadable) == [
        str(video)
    ]


def test_the_command_reports_and_removes(tmp_path, reasoning_file, reasoning_rows, frames):
    write_video(tmp_path / "copied.mp4", resized(frames[3], 96, 96), 4)
    write_rows(
        tmp_path / "eval.jsonl", [row(tmp_path / "copied.mp4"), row(tmp_path / "gone away.mp4")]
    )
    arguments = ["leaks", str(reasoning_file), str(tmp_path / "eval.jsonl")]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "leaks.json")]
    arguments += ["--remove", str(tmp_path / "clean.jsonl")]
    result = run_storm(*arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 12" in result.output and "cannot be read" in result.output
    folded = "".join(line.split()[0] for line in result.stdout.splitlines()[1:4])
    assert folded.startswith(Path(reasoning_rows[3].video).name[:30]) and "…" not in result.stdout
    told = json.loads((tmp_path / "leaks.json").read_text())
    assert [leak["train_rows"] for leak in told["leaks"]] == [[reasoning_rows[3].id]]
    assert list(told["unreadable"]) == [str(tmp_path / "gone away.mp4")]
    left = [row for row in reasoning_rows if row is not reasoning_rows[3]]
    assert read_rows(tmp_path / "clean.jsonl") == left
