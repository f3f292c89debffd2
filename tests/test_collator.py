import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_processor
from tiny_backbones import TINY
from torch.utils.data import DataLoader

from storm_vlm.data.collator import LAYOUT, Question, StormCollator, VideoInputs
from storm_vlm.data.prompt import build_messages, render_prompt
from storm_vlm.data.row import Row
from storm_vlm.data.video import Clip, VideoError, read_video, video_metadata, write_video
from storm_vlm.errors import StormError

NUM_FRAMES, BUDGET, HIDDEN = 6, 4, 8
VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Three rows that differ in picture size, rate, window, question and answer length."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for name, shape, fps in (
        ("a", (12, 56, 56), 4),
        ("b", (20, 28, 112), 10),
        ("c", (5, 84, 56), 2),
    ):
        frames = random.integers(0, 255, (*shape, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", frames, fps)

    def row(name: str, question: str, answer: str, **more: Any) -> Row:
        path = str(folder / f"{name}.mp4")
        return Row(id=name, video=path, question=question, answer=answer, split="train", **more)

    return [
        row("a", "Q?", "y", options=("x", "y")),
        row("b", "And?", "ten é", start=0.5),
        row("c", "A longer one?", "no"),
    ]


def stock_batch(processor, rows: Sequence[Row], mode) -> dict[str, torch.Tensor]:
    """The same batch by one call of the stock processor on text and videos together."""
    clips = [read_video(row.video, NUM_FRAMES, row.start, row.end) for row in rows]
    texts = [render_prompt(processor, build_messages(r.question, r.options), mode) for r in rows]
    outputs = processor(
        text=texts,
        videos=[clip.frames for clip in clips],
        video_metadata=[video_metadata(clip) for clip in clips],
        do_sample_frames=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return {name: torch.as_tensor(value) for name, value in outputs.items()}


@pytest.mark.parametrize("mode", ["force", "auto", "off"])
def test_prompts_equal_the_stock_processor(processor, rows, mode):
    batch = StormCollator(processor, NUM_FRAMES, BUDGET).collate_prompts(rows, mode)
    expected = stock_batch(processor, rows, mode)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype, name
        assert torch.equal(batch[name], value), name
    # the rows do differ, and the tokens fit the grids
    assert len({tuple(grid) for grid in batch["video_grid_thw"].tolist()}) == 3
    assert (batch["mm_token_type_ids"] == 2).sum() == batch["video_grid_thw"].prod(1).sum() // 4
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([1.1, 2 * 1.4 / 5, 1.0])


def test_a_batch_is_its_rows_padded_on_the_left(processor, rows):
    collator = StormCollator(processor, NUM_FRAMES, BUDGET)
    batch = collator(rows)
    patches = 0
    for index, row in enumerate(rows):
        alone = collator([row])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][index, -length:], alone["input_ids"][0])
        assert (
            batch["attention_mask"][index].tolist()
            == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
        )
        count = len(alone["pixel_values_videos"])
        both = (
            batch["pixel_values_videos"][patches : patches + count],
            alone["pixel_values_videos"],
        )
        assert torch.equal(*both)
        patches += count
    assert patches == len(batch["pixel_values_videos"])


def test_labels_are_the_answer_and_the_end_of_turn(processor, rows):
    labels = StormCollator(processor, NUM_FRAMES, BUDGET)(rows)["labels"]
    for ids, answer in zip(labels, ("B", "ten é", "no"), strict=True):
        kept = ids[ids != -100]
        assert processor.tokenizer.decode(kept) == answer + "<|im_end|>"
        assert torch.equal(ids[: len(kept)], kept)  # padded on the right
    assert labels.shape[1] == len("ten é".encode()) + 1


@pytest.mark.parametrize("budget", [0, BUDGET])
def test_the_budget_decides_whether_the_latent_segment_is_open(processor, rows, budget):
    last = StormCollator(processor, NUM_FRAMES, budget)(rows)["input_ids"][:, -1]
    start = processor.tokenizer.convert_tokens_to_ids("<|latent_start|>")
    assert (last == start).tolist() == [budget > 0] * 3


def test_targets_are_stacked_and_masked(processor, rows):
    collator = StormCollator(processor, NUM_FRAMES, BUDGET)
    given = [torch.randn(BUDGET, HIDDEN, dtype=torch.bfloat16), None, torch.ones(BUDGET, HIDDEN)]
    batch = collator(list(zip(rows, given, strict=True)))
    assert batch["targets"].dtype == torch.float32
    assert batch["target_mask"].tolist() == [True, False, True]
    assert given[0] is not None and torch.equal(batch["targets"][0], given[0].float())
    assert batch["targets"][1].abs().sum() == 0
    assert batch["targets"][2].sum() == BUDGET * HIDDEN

    whole = collator([(row, torch.ones(BUDGET, HIDDEN)) for row in rows])
    assert whole["targets"].shape == (3, BUDGET, HIDDEN) and whole["target_mask"].all()
    none = collator([(row, None) for row in rows])
    assert "targets" not in none and not none["target_mask"].any()
    assert "target_mask" not in collator(rows)


def test_a_row_of_its_own_number_of_slots_has_as_many_targets(processor, rows):
    collator = StormCollator(processor, NUM_FRAMES, BUDGET)
    few = [row.model_copy(update={"slots": n}) for row, n in zip(rows, (2, None, 1), strict=True)]
    given = [torch.ones(2, HIDDEN), torch.ones(BUDGET, HIDDEN), None]
    batch = collator(list(zip(few, given, strict=True)))
    assert batch["slots"].tolist() == [2, BUDGET, 1]
    assert batch["targets"].sum((1, 2)).tolist() == [2 * HIDDEN, BUDGET * HIDDEN, 0]
    assert StormCollator(processor, NUM_FRAMES, 1)(few)["slots"].tolist() == [1, 1, 1]
    assert "slots" not in collator(rows) and "slots" not in StormCollator(processor, 4, 0)(few)
    with pytest.raises(ValueError, match="a row's own slots"):
        collator([(few[0], torch.ones(BUDGET, HIDDEN))])


def test_targets_that_do_not_fit_are_refused(processor, rows):
    collator = StormCollator(processor, NUM_FRAMES, BUDGET)
    with pytest.raises(ValueError, match="latent_budget = 4"):
        collator([(row, torch.ones(BUDGET + 1, HIDDEN)) for row in rows])
    with pytest.raises(ValueError, match="compute them again"):
        collator([(row, torch.ones(BUDGET, i + 2)) for i, row in enumerate(rows)])


def test_questions_serve_as_rows_with_a_clip_or_without_video(processor, rows):
    collator = StormCollator(processor, NUM_FRAMES, BUDGET)
    row = rows[1]
    clip = read_video(row.video, NUM_FRAMES, row.start)
    asked = collator.collate_prompts([Question(clip, row.question)], "force")
    expected = collator.collate_prompts([row], "force")
    assert asked.keys() == expected.keys()
    assert all(torch.equal(asked[name], expected[name]) for name in expected)

    text = collator.collate_prompts([Question(None, "Why?")], "off")
    assert text.keys() == {"input_ids", "attention_mask", "mm_token_type_ids"}
    mixed = collator.collate_prompts([Question(None, "Why?"), row], "off")
    assert mixed["video_grid_thw"].shape == (1, 3)
    assert mixed["mm_token_type_ids"][0].sum() == 0


def test_cached_videos_are_not_read_again_and_stay_within_the_bound(processor, tmp_path: Path):
    paths = [str(tmp_path / f"{name}.mp4") for name in "abc"]
    for level, path in enumerate(paths):
        write_video(path, np.full((4, 28, 28, 3), 60 * level, np.uint8), 4)
    size = sum(tensor.nbytes for tensor in VideoInputs(processor, 4).get(paths[0]).values())
    videos = VideoInputs(processor, 4, cache_bytes=2 * size)
    first = videos.get(paths[0])
    assert set(first) == {*VIDEO_KEYS, LAYOUT}
    videos.get(paths[1])
    videos.get(paths[0])  # now b is the one used longest ago
    videos.get(paths[2])
    for path in paths:
        Path(path).unlink()
    assert videos.get(paths[0]) is first
    videos.get(paths[2])
    with pytest.raises(VideoError, match=r"b\.mp4"):
        videos.get(paths[1])
    with pytest.raises(VideoError):
        videos.get(paths[0], 0.25)  # another window is another clip


def test_without_a_cache_nothing_is_kept(processor, tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((4, 28, 28, 3), np.uint8), 4)
    videos = VideoInputs(processor, 4)
    videos.get(str(path))
    path.unlink()
    with pytest.raises(VideoError):
        videos.get(str(path))


@pytest.mark.parametrize("height", [1, 3])
def test_a_height_is_not_taken_for_channels(processor, height):
    frames = np.zeros((4, height, 96, 3), np.uint8)
    frames[..., 0] = 255  # red: taken for channels, rows would be red, black and black
    clip = Clip(frames, np.arange(4) / 4, "thin.mp4")
    patches = VideoInputs(processor, 4).process(clip)["pixel_values_videos"]
    channels = patches.unflatten(1, (3, -1))
    assert (channels.std((0, 2)) < 1e-4).all() and channels[0, 0, 0] > channels[0, 2, 0]


def test_a_clip_too_thin_for_the_model_is_named(processor):
    clip = Clip(np.zeros((4, 2, 402, 3), np.uint8), np.arange(4) / 4, "thin.mp4")
    with pytest.raises(VideoError, match=r"thin\.mp4: 402 x 2 pixels are more than 200 to 1; crop"):
        VideoInputs(processor, 4).process(clip)


def test_windows_of_one_clip_are_kept_apart(processor, tmp_path: Path):
    """By where they end, too."""
    frames = np.arange(0, 240, 30, dtype=np.uint8)[:, None, None, None].repeat(28, 1)
    write_video(tmp_path / "a.mp4", frames.repeat(28, 2).repeat(3, 3), 4)
    videos = VideoInputs(processor, 2, cache_bytes=2**20)
    windows = [(None, None), (None, 1.0), (None, 0.5), (0.5, None), (0.5, 1.0)]
    pixels = [videos.get(str(tmp_path / "a.mp4"), *w)["pixel_values_videos"] for w in windows]
    for first, one in enumerate(pixels):
        assert all(not torch.equal(one, other) for other in pixels[:first])
        alone = VideoInputs(processor, 2).get(str(tmp_path / "a.mp4"), *windows[first])
        assert torch.equal(one, alone["pixel_values_videos"])


def test_a_processor_that_leaves_it_open_caps_the_pixels_of_each_frame(tmp_path: Path):
    """As Qwen2.5-VL was trained: without the cap, a long clip would have ever more visual tokens."""
    write_video(tmp_path / "a.mp4", np.zeros((2, 448, 448, 3), np.uint8), 4)

    def grid(cap: bool | None) -> list[int]:
        processor = tiny_processor()
        processor.video_processor.cap_pixels_per_frame = cap
        processor.video_processor.max_video_tokens = 12
        return VideoInputs(processor, 2).get(str(tmp_path / "a.mp4"))["video_grid_thw"][0].tolist()

    assert grid(None) == grid(True) != grid(False)


def test_it_is_a_data_collator_of_transformers(processor, rows):
    """Rows as mappings, as `datasets` yields them; and rows with their targets in pairs."""
    collator = StormCollator(processor, NUM_FRAMES, BUDGET)
    expected = collator(rows)
    plain = [row.model_dump() for row in rows]
    (batch,) = DataLoader(plain, batch_size=3, collate_fn=collator)  # type: ignore[arg-type]
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    targets = [torch.ones(BUDGET, HIDDEN), None, None]
    pairs = collator(list(zip(rows, targets, strict=True)))
    assert pairs["target_mask"].tolist() == [True, False, False]
    with pytest.raises(ValueError, match="answer"):
        collator([{**plain[0], "answer": "none of them"}])


@pytest.mark.parametrize("name", TINY)
def test_max_pixels_are_those_of_a_frame(name: str):
    """Of all families whose frames are not of one size, whether their processors bound a frame or a clip."""
    processor = TINY[name]()[1]
    video = processor.video_processor
    if name in ("llava_onevision", "internvl"):
        with pytest.raises(StormError, match="leave max_pixels out"):
            VideoInputs(processor, 16, max_pixels=112 * 112)
        return
    video.size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28 * 4}
    for pixels in (112 * 112, 280 * 280):
        videos = VideoInputs(processor, 16, max_pixels=pixels)
        for count in (1, 2, 4, 5, 7, 16, 32):
            for side in (28, 336, 448):
                clip = Clip(np.zeros((count, side, side, 3), np.uint8), np.arange(count) / 4, "a")
                times, *sides = videos.process(clip)["video_grid_thw"][0].tolist()
                shown = 14 * 14 * math.prod(sides)
                assert times == math.ceil(count / 2) and shown <= pixels, (count, side)
                if side > 28 and count != 5:  # transformers counts five frames as four
                    assert shown == pixels, (count, side)


@pytest.mark.parametrize("name", TINY)
def test_a_picture_is_a_clip_of_one_frame(name: str):
    processor = TINY[name]()[1]
    clip = Clip(np.random.default_rng(0).integers(0, 255, (1, 56, 56, 3), np.uint8), np.ones(1), "")
    ours = VideoInputs(processor, 1).process(clip)
    frames = clip.frames
    if name.startswith(("qwen3", "glm4v")):
        with pytest.raises(ValueError, match="temporal_factor"):
            processor(text=[processor.video_token], videos=[frames], do_sample_frames=False)
        frames = frames.repeat(2, 0)
    theirs = processor(
        text=[processor.video_token],
        videos=[frames],
        video_metadata=[video_metadata(replace(clip, frames=frames))],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert torch.equal(ours[LAYOUT], theirs["input_ids"][0])
    for key in ours.keys() - {LAYOUT}:
        assert torch.equal(ours[key], torch.as_tensor(theirs[key])), key
