"""`storm pretrain`: the micro backbones are stock models of their families."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run_storm
from transformers import AutoModelForImageTextToText

from storm_vlm.data.collator import VideoInputs
from storm_vlm.data.row import read_rows
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab import pretrain
from storm_vlm.lab.world.backbone import FAMILIES, ModelType
from storm_vlm.lab.world.mirrors import NUM_FRAMES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_in_small(
    model_type: ModelType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "TEST_CLIPS", 1)
    out, data = tmp_path / "out", tmp_path / "data"
    options = ("--data", data, "--clips", 4, "--steps", 3, "--model-type", model_type)
    result = run_storm("pretrain", out, *options)
    assert result.exit_code == 0, result.output
    assert "position" in json.loads((out / "perception.json").read_text())["all"]
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.model_type == model_type
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.4e6
    rows = read_rows(data / "perception-train-0.jsonl")
    processor = StormPipeline.from_pretrained(str(out), device="cpu").processor
    videos = VideoInputs(processor, NUM_FRAMES)
    collator = pretrain.ConversationCollator(processor, videos, pretrain.PHASES[1])
    turns = [row for row in rows if row.video == rows[0].video]
    batch = collator([turns])
    ids = batch["input_ids"]
    # A visual token is one cell of one step; the clip stands in the first of several turns.
    assert int((ids == processor.video_token_id).sum()) == 3 * 4 * 4
    assert int((ids == processor.tokenizer.eos_token_id).sum()) > 6
    with torch.no_grad():
        whole = model(**batch).logits
        if model_type == "qwen3_vl":  # it sees by deepstack, too
            merger = model.model.visual.deepstack_merger_list[0]
            torch.nn.init.zeros_(merger.linear_fc2.weight)
            assert not torch.allclose(model(**batch).logits, whole)
