"""The micro experiment, in small."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storm_vlm.analysis.controls import chain as chain_of
from storm_vlm.data.answer import is_correct
from storm_vlm.data.row import Row
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.arms import ARMS
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.experiment import (
    LONGEST_ANSWER,
    Size,
    build_data,
    read_results,
    run_arm,
    run_arms,
)
from storm_vlm.lab.micro_config import MICRO_CONFIGS
from storm_vlm.lab.world.backbone import deepen
from storm_vlm.model.latent import answer_loss
from storm_vlm.model.rollout import rollout
from storm_vlm.training.checkpoints import last_whole_checkpoint, seal
from storm_vlm.training.config import load_config

TINY = Size(train_rows=8, test_rows=6, ood_rows=4, steps=2)


@pytest.mark.parametrize("arm", [arm for arm, what in ARMS.items() if what.trained])
def test_every_arm_takes_the_same_number_of_steps_and_its_configs_are_valid(arm: str) -> None:
    stages, after = ARMS[arm].stages, ARMS[arm].after
    before = ARMS[after].stages if after else ()
    # But for a Stage I with nothing after it.
    steps = sum(stage.share for stage in (*before, *stages))
    assert steps == (0.8 if arm in ("stage1_first", "third_first") else 1)
    for stage in stages:
        config = load_config(MICRO_CONFIGS / f"{stage.config}.yaml", list(stage.overrides))
        assert config.training["per_device_train_batch_size"] == 16
        assert ARMS[arm].latent == (
            config.method.latent_budget > 0 and config.method.slot_input != "pause"
        )


def test_a_chain_of_thought_is_the_plan_and_its_answer_is_what_the_scorer_reads(
    reasoning_rows: list[Row],
) -> None:
    pipeline = StormPipeline.from_pretrained(str(shipped("backbone")))
    for row in reasoning_rows:
        chain = chain_of(row).answer
        assert is_correct(chain, row) and chain.count(row.answer) >= 1
        assert not is_correct(chain.replace(f"<answer>{row.answer}", "<answer>nothing"), row)
        assert len(pipeline.processor.tokenizer(chain)["input_ids"]) < LONGEST_ANSWER
        assert "The answer is" not in chain


def test_a_deeper_backbone_computes_the_same_and_all_of_it_learns(
    tmp_path: Path, reasoning_rows: list[Row]
) -> None:
    shallow = StormPipeline.from_pretrained(str(shipped("backbone")))
    deep = StormPipeline.from_pretrained(str(deepen(shipped("backbone"), tmp_path / "deep", 6)))
    assert len(deep.model.model.language_model.layers) == 6
    batch = shallow.collator(reasoning_rows[:2])
    with torch.no_grad():
        before = rollout(shallow.model, batch, 0).logits
    after = rollout(deep.model, batch, 0).logits
    torch.testing.assert_close(after, before)
    answer_loss(after, batch["labels"]).backward()
    silent = [
        name
        for name, weight in deep.model.model.language_model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    new = {
        name.split(".")[1] for name in silent
    }  # what lies before an output of zero moves a step later
    assert len(new) == 2 and not any(
        n.endswith(("o_proj.weight", "down_proj.weight")) for n in silent
    )


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Stage I is done, Stage II is not: only Stage II is trained again."""
    data = build_data(tmp_path / "data", TINY)
    first = run_arm(tmp_path, tmp_path, data, "full", 0, TINY)
    folder = tmp_path / "full-0"
    stage1 = (folder / "0-stage1" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "full-0.json.gz").unlink()
    (folder / "1-stage2" / "versions.json").unlink()
    stage2 = (folder / "1-stage2" / "model.safetensors").stat().st_mtime_ns
    again = run_arm(tmp_path, tmp_path, data, "full", 0, TINY)
    assert first["seconds"] >= 0 and again.pop("seconds") is None
    assert again == {name: value for name, value in first.items() if name != "seconds"}
    assert (folder / "0-stage1" / "model.safetensors").stat().st_mtime_ns == stage1
    assert (folder / "1-stage2" / "model.safetensors").stat().st_mtime_ns != stage2


def test_outcomes_of_other_settings_are_refused(tmp_path: Path) -> None:
    data = build_data(tmp_path / "data", TINY)
    made = run_arm(tmp_path, tmp_path, data, "sft", 0, TINY)
    assert made["recipe"]["stages"][0]["training"]["max_steps"] == 2
    assert not re.search(r'"(/|runs)', json.dumps(made))  # nothing of this machine
    assert read_results(tmp_path, TINY) == {"sft": [made]}
    longer = replace(TINY, steps=3)
    for again in (
        lambda: run_arm(tmp_path, tmp_path, data, "sft", 0, longer),
        lambda: read_results(tmp_path, longer),
    ):
        with pytest.raises(ValueError, match=r"sft-0.json.gz was made with .*delete it"):
            again()


def test_an_interrupted_stage_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storm_vlm.lab.experiment.SAVE_STEPS", 1)
    size = replace(TINY, steps=3)
    data = build_data(tmp_path / "data", size)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted = run_arm(whole, whole, data, "sft", 0, size)

    def seal_and_stop(checkpoint: Path) -> None:
        seal(checkpoint)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("storm_vlm.training.trainer.seal", seal_and_stop)
        run_arm(stopped, stopped, data, "sft", 0, size)
    stage = stopped / "sft-0" / "0-sft"
    assert last_whole_checkpoint(stage) == stage / "checkpoint-1"
    saved = []
    monkeypatch.setattr(
        "storm_vlm.training.trainer.seal", lambda c: (saved.append(c.name), seal(c))
    )
    again = run_arm(stopped, stopped, data, "sft", 0, size)
    assert saved == ["checkpoint-2", "checkpoint-3"]
    assert again["test"] == uninterrupted["test"]
    weights = Path("sft-0", "0-sft", "model.safetensors")
    assert (stopped / weights).read_bytes() == (whole / weights).read_bytes()
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_arms_that_start_from_one_and_the_same_run_side_by_side(tmp_path: Path) -> None:
    """Each would train, or look at, what the other is at work on."""
    arms, alone, both = ("answers", "answers_anchored_fast"), tmp_path / "alone", tmp_path / "both"
    one_by_one = run_arms(alone, alone, arms, [0], TINY, 1)
    side_by_side = run_arms(both, both, arms, [0], TINY, 2)
    made = {result["arm"]: result["test"] for result in side_by_side}
    assert made == {result["arm"]: result["test"] for result in one_by_one}
