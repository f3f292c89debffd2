"""The benchmark compares what it says it compares."""

import json
from pathlib import Path

import torch
from tiny_model import BUDGET, labels_for, left_pad, prompts, tiny_model

from storm_vlm.lab.bench import read
from storm_vlm.lab.bench.questions import bench_questions
from storm_vlm.lab.bench.training_step import bench_train, naive_rollout, random_batch, shape_config
from storm_vlm.model.rollout import rollout


def test_the_naive_rollout_is_the_same_function() -> None:
    model = tiny_model().double()
    rows = prompts()
    batch = {**left_pad(rows), "labels": labels_for(len(rows))}
    naive, cached = naive_rollout(model, batch, BUDGET), rollout(model, batch, BUDGET)
    torch.testing.assert_close(naive.logits, cached.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(naive.states, cached.states, atol=1e-6, rtol=0)


def test_published_shapes_have_published_sizes() -> None:
    from transformers import AutoModelForImageTextToText

    for shape, billions in (("3b", 3.75), ("7b", 8.29)):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shape_config(shape))  # type: ignore[arg-type]
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions


def test_it_writes_ratios_of_one_run(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    found = bench_train("micro", 500, 2, [1, 2], 2, True, "cpu", out)
    assert json.loads(out.read_text()) == found
    config = shape_config("micro")
    config.latent_start_token_id = 0
    assert found["prefix_tokens"] == random_batch(config, 1, 500, "cpu")["input_ids"].shape[1]
    for rows in ("1", "2"):
        ratios = found["batch"][rows]
        assert ratios["naive_over_stage2"]["median"] > 0 and ratios["memory_over_sft"] is None
        seconds = ratios["seconds"]
        assert set(seconds) == {"sft", "stage1", "stage2", "naive"} and min(seconds.values()) > 0


def test_questions_about_one_clip_are_measured_with_and_without_what_they_share(tmp_path) -> None:
    out = tmp_path / "questions.json"
    found = bench_questions("micro", "cpu", 2, 4, 8, 2, out)
    assert json.loads(out.read_text()) == {"micro cpu": found}
    assert found["same_answers"] == found["items"] == 8
    assert found["ratio"]["median"] > 1


def test_reading_is_measured_on_frames_that_are_known(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(read.SIZES, "tiny", read.Size(160, 96, repeats=2))
    found = read.bench_read(["tiny"], 5, 2, tmp_path / "reading.json")
    assert json.loads((tmp_path / "reading.json").read_text())["sizes"].keys() == {"tiny"}
    assert found["sizes"]["tiny"]["same_frames"] and found["sizes"]["tiny"]["storm"].cpu_seconds > 0
    read._write(tmp_path / "clip.mp4", read.SIZES["tiny"])
    times, numbers = read._measure(str(tmp_path / "clip.mp4"), "storm", 5, 1, None)[1]
    assert numbers == [round(time * read.RATE) % 300 for time in times] and times[-1] > 19.9
