"""Visual gain: the stock model's own probabilities, and what the filter does with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storm_vlm.construction.build import run
from storm_vlm.construction.config import BuildConfig
from storm_vlm.construction.visual_gain import VisualGain, followed_by
from storm_vlm.data.prompt import answer_text
from storm_vlm.data.row import Row, ThoughtVideo, read_rows, write_rows
from storm_vlm.data.video import read_video, video_metadata, write_video
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.thought_judge import train_judge, with_visual_gain


@pytest.fixture(scope="module")
def gain(backbone: str) -> VisualGain:
    return VisualGain(backbone)


def stock_probability(storm: StormPipeline, row: Row, clip: Any) -> float:
    """By the processor and the model of transformers alone."""
    content = [{"type": "video"}, {"type": "text", "text": row.question}]
    text = storm.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    answer = answer_text(row) + storm.processor.tokenizer.eos_token
    ids = storm.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    batch = storm.processor(
        text=[text + answer],
        videos=[clip.frames],
        video_metadata=[video_metadata(clip)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = storm.model(**batch).logits[0, -len(ids) - 1 : -1].double().log_softmax(-1)
    return float(logits[range(len(ids)), ids].sum().exp())


def test_it_is_the_difference_of_the_stock_models_probabilities(
    gain: VisualGain, backbone: str, reasoning_rows: list[Row]
) -> None:
    storm = StormPipeline.from_pretrained(backbone)
    for row in reasoning_rows[:3]:
        thought = row.thought_video
        assert thought is not None
        clip = read_video(row.video, 3)  # half of the six frames that it was trained with
        both = followed_by(clip, thought, 3)
        expected = stock_probability(storm, row, both) - stock_probability(storm, row, clip)
        assert gain(row) == pytest.approx(expected, rel=1e-3, abs=1e-9) and expected
    assert gain(reasoning_rows[0].model_copy(update={"thought_video": None})) == 0


def test_the_thought_video_goes_on_where_the_clip_ends(
    reasoning_rows: list[Row], tmp_path: Path
) -> None:
    row, large = reasoning_rows[0], np.zeros((8, 256, 320, 3), np.uint8)
    write_video(tmp_path / "large.mp4", large, 10)
    thought = ThoughtVideo(path=str(tmp_path / "large.mp4"), source="generated", generator="test")
    clip = read_video(row.video, 4)
    both = followed_by(clip, thought, 6)
    assert both.frames.shape == (10, *clip.frames.shape[1:]) and both.frames[4:].max() < 3
    np.testing.assert_array_equal(both.frames[:4], clip.frames)
    assert both.fps == pytest.approx(clip.fps)


def test_a_build_leaves_out_what_makes_the_answer_less_likely(
    backbone: str, gain: VisualGain, reasoning_rows: list[Row], tmp_path: Path
) -> None:
    rows = [row.model_copy(update={"thought_video": None}) for row in reasoning_rows[:6]]
    write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"generator": "erring_world", "visual_gain_model": backbone, "workers": 2}
    open_all = {"filters": dict.fromkeys(("flicker", "mismatch", "frozen", "duplicate"))}
    config = BuildConfig.model_validate({**settings, **open_all})
    summary = run(tmp_path / "rows.jsonl", tmp_path / "built", config)
    kept = read_rows(tmp_path / "built" / "rows.jsonl")
    assert summary["rejected"] == {"visual_gain": 6 - len(kept)} and 0 < len(kept) < 6
    for row in kept:
        assert row.thought_video is not None
        score = row.thought_video.provenance["scores"]["visual_gain"]
        assert score >= 0 and score == pytest.approx(gain(row), abs=1e-5)
    plain = BuildConfig.model_validate({**settings, "visual_gain_model": None}).determining()
    assert "visual_gain_model" not in plain  # keys of earlier builds stay what they were


def test_the_micro_worlds_judge_is_trained_once_on_other_scenes(
    reasoning_rows: list[Row], tmp_path: Path
) -> None:
    rows = reasoning_rows[:6]
    kept = with_visual_gain(rows, tmp_path)
    judge, written = VisualGain(str(tmp_path / "judge")), tmp_path / "judge" / "model.safetensors"
    assert kept == [row for row in rows if judge(row) >= 0]
    shown = read_rows(tmp_path / "judge-clips" / "rows.jsonl")
    lengths = [len(read_video(row.video, 99).frames) for row in shown]
    assert lengths == [6, 12, 12, 6, 12, 12] and not any(row.thought_video for row in shown)
    assert not {row.id for row in shown} & {row.id for row in rows}
    before = written.stat().st_mtime_ns
    assert train_judge(tmp_path, 6) == tmp_path / "judge"
    assert written.stat().st_mtime_ns == before
