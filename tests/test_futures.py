"""TwiFF, Future-L1 and V1-33K, in the layouts that their own loaders read: see `datasets/futures.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storm_vlm.data.row import Row, read_rows
from storm_vlm.data.video import read_video, write_video
from storm_vlm.datasets.futures import eight_frames
from storm_vlm.datasets.transfer import Counts, import_rows, rejects_file
from storm_vlm.training.distillation import thought_question
from storm_vlm.training.targets import excerpts

TWIFF: dict[str, Any] = {
    "video": "clips/a.mp4",
    "frames": [1, 2],
    "recon_frames": [4, 6],
    "conversations": [
        {"from": "system", "value": "You imagine."},
        {"from": "human", "value": "frame_1\n<image>\nframe_2\n<image>\nWhat next?"},
        {
            "from": "gpt",
            "value": "It is hot.\n<rimage>\nOil runs.\n<rimage>\nSo:\n<ans>An egg\nis fried.</ans>",
        },
    ],
}
FUTURE_L1: dict[str, Any] = {
    "id": "x1",
    "video": "clips/a.mp4",
    "image": [1],
    "reasoning_image": [3, 6],
    "conversations": [
        {"from": "human", "value": "frame_1\n<image>\nWhat next?"},
        {"from": "gpt", "value": "THOUGHT 1: It is hot.\n<image>\nTHOUGHT 2: Oil runs.\n<image>"},
    ],
    "answer": "<answer>An egg.</answer>",
}
V1: dict[str, Any] = {
    "id": 7,
    "video_path": "./video_dataset/yt/x.mp4",
    "video_split": {"split_caption": {"caption_part1": "A pan.", "caption_part2": "An egg."}},
    "ds_reasoning": {"rewritten_reasoning_content": "It is hot, so …"},
}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty frames at 10 a second; frame n is as bright as 10 n."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "clips").mkdir()
    frames = np.stack([np.full((48, 64, 3), 10 * n, np.uint8) for n in range(20)])
    write_video(folder / "clips" / "a.mp4", frames, 10, crf=0)
    return folder


def imported(
    name: str, media: Path, out: Path, *items: Any, **options: Any
) -> tuple[list[Row], Counts]:
    source = out / "source.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    counts = import_rows(name, source, out / "rows.jsonl", media, **options)
    return (read_rows(out / "rows.jsonl") if counts.written else []), counts


def shown(path: str, start: float | None, end: float | None) -> list[int]:
    clip = read_video(path, 99, start, end)
    return [round(float(frame.mean()) / 10) for frame in clip.frames]


@pytest.mark.parametrize(
    ("count", "numbers"),
    [
        (100, [1, 9, 25, 41, 57, 73, 89, 98]),
        (10, [1, 2, 3, 4, 5, 6, 7, 8]),
        (5, [1, 1, 2, 3, 3, 3, 3, 3]),
    ],
)
def test_the_eight_frames_are_upstream_s(count: int, numbers: list[int]) -> None:
    assert eight_frames(count) == numbers  # as TwiFF's own code numbers them


def test_windows_are_right_to_the_frame(media: Path, tmp_path: Path) -> None:
    (row,), _ = imported("twiff", media, tmp_path, TWIFF)
    assert eight_frames(20) == [1, 2, 5, 8, 10, 13, 16, 18]
    assert shown(row.video, row.start, row.end) == [0, 1, 2]
    assert [shown(row.video, t, t + 0.01)[0] for t in row.keyframes] == [1, 2]
    thought = row.thought_video
    assert thought and thought.path == row.video and thought.source == "future"
    assert shown(thought.path, thought.start, thought.end) == [2, *range(3, 14)]
    assert (
        thought.provenance["times"] == [0.8, 1.3]
        and "second last" in thought.provenance["frames_of_8"]
    )
    assert (row.question, row.answer) == ("What next?", "An egg\nis fried.")
    assert row.plan == "It is hot.\nOil runs.\nSo:" and row.options == ()
    assert row.meta["source"] == "twiff"
    # … and so does training: the target's frames, and what a teacher of its own is asked about
    (excerpt,) = excerpts([row], "thought_video")
    assert excerpt and shown(excerpt.path, excerpt.start, excerpt.end) == [2, *range(3, 14)]
    asked = thought_question(row)
    assert (asked.video, asked.start, asked.end) == (thought.path, thought.start, thought.end)


def test_future_l1_and_the_chats_in_its_file(media: Path, tmp_path: Path) -> None:
    arrow = {"from": ["human", "gpt"], "value": [t["value"] for t in FUTURE_L1["conversations"]]}
    chat = {
        "messages": [
            {"role": "user", "content": "<video>What is hot?"},
            {"role": "assistant", "content": "The pan."},
        ],
        "videos": ["clips/a.mp4"],
    }
    items = (FUTURE_L1, FUTURE_L1 | {"conversations": arrow, "id": "x2", "cot": "Hot oil."}, chat)
    (row, other, plain), counts = imported("future-l1", media, tmp_path, *items)
    assert not counts.rejected
    assert (row.id, row.question, row.answer) == ("future-l1-x1", "What next?", "An egg.")
    assert row.plan == "It is hot.\nOil runs." and other.plan == "Hot oil."
    assert shown(row.video, row.start, row.end) == [0, 1]
    assert row.thought_video and row.thought_video.end == other.thought_video.end == pytest.approx(
        1.35
    )  # type: ignore[union-attr]
    assert plain.answer == "The pan." and plain.thought_video is None


def test_v1_33k_has_a_file_for_what_is_seen_and_one_for_what_follows(
    media: Path, tmp_path: Path
) -> None:
    (row,), counts = imported("v1-33k", media, tmp_path, V1, {"qa": {}, "video_path": "x"})
    assert row.video == str(media / "first_part_video/yt/x.mp4") and row.end is None
    assert row.thought_video
    assert row.thought_video.path == str(media / "second_part_video/yt/x.mp4")
    assert (row.answer, row.plan) == ("An egg.", "It is hot, so …")
    assert counts.skipped == {"FutureBench's question: it is no training row": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recon_frames": [2, 6]}, "imagined frames are seen already"),
        ({"recon_frames": [4]}, "recon_frames do not match the placeholders"),
        ({"frames": [0, 2]}, "frames are not numbers from 1 to 8"),
        ({"video": "clips/gone.mp4"}, "no such video file"),
        ({"video": "clips/a.PNG"}, "a picture where a video should be"),
        (
            {"conversations": TWIFF["conversations"][1:2]},
            "turns are not one question and one reply",
        ),
    ],
)
def test_what_would_leak_or_is_not_whole_is_rejected(
    changes: dict[str, Any], reason: str, media: Path, tmp_path: Path
) -> None:
    _, counts = imported("twiff", media, tmp_path, TWIFF | changes)
    assert counts.written == 0 and counts.rejected.total() == 1
    assert reason in rejects_file(tmp_path / "rows.jsonl").read_text()


def test_a_benchmark_s_clips_are_left_out(media: Path, tmp_path: Path) -> None:
    bench = tmp_path / "futurebench.json"
    bench.write_text(json.dumps([{"video_path": "./video_dataset/yt/x.mp4", "qa": {}}]))
    items = (V1, V1 | {"id": 8, "video_path": "video_dataset/yt/y.mp4"})
    (row,), counts = imported("v1-33k", media, tmp_path, *items, without=bench)
    assert row.id == "v1-33k-8" and counts.skipped == {"clip that is to be left out": 1}


@pytest.mark.parametrize("name", ["llava-video", "llama-factory"])
@pytest.mark.parametrize("item", [TWIFF, FUTURE_L1])
def test_other_importers_do_not_take_them(
    name: str, item: Any, media: Path, tmp_path: Path
) -> None:
    _, counts = imported(name, media, tmp_path, item)
    assert counts.written == 0
