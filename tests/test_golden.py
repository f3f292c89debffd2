"""Losses that must not change unnoticed: 20 steps of every stage, and the flat loop's beside the Trainer's.

After a change that is meant to alter them: `STORM_GOLDEN=write pytest tests/test_golden.py`, and say why in the
commit.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor

from storm_vlm.data.row import read_rows
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.micro_config import MICRO_CONFIGS
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.tokens import add_latent_tokens
from storm_vlm.training.config import load_config
from storm_vlm.training.train import train

ROOT = Path(__file__).parent
GOLDEN = ROOT / "golden" / "losses.json"
STAGES = ("sft", "pause", "stage1", "stage2")
STEPS = 20


def start(stage: str) -> str:
    """Stage II goes on from a Stage I: from the backbone, its first steps multiply rounding errors."""
    return str(shipped("storm" if stage == "stage2" else "backbone"))


def trainer_losses(stage: str, folder: Path, data: Path) -> list[float]:
    """Of a shipped micro config, smaller, rows in their order."""
    overrides = [
        f"model={start(stage)}",
        f"data={data}",
        f"output_dir={folder / stage}",
        f"training.max_steps={STEPS}",
        "training.per_device_train_batch_size=4",
        "muon=null",  # the flat loop has AdamW
        "training.learning_rate=1e-4",
        "training.warmup_steps=5",
        "training.logging_steps=1",
        "training.train_sampling_strategy=sequential",
        "training.seed=0",
        "training.report_to=none",
        "training.disable_tqdm=true",
    ]
    output = train(load_config(MICRO_CONFIGS / f"{stage}.yaml", overrides))
    history = json.loads((output / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def losses(tmp_path_factory, reasoning_file: Path) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("golden")
    return {stage: trainer_losses(stage, folder, reasoning_file) for stage in STAGES}


def test_the_losses_of_twenty_steps_are_the_recorded_ones(losses) -> None:
    if os.environ.get("STORM_GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(STAGES)
    for stage, values in golden.items():
        assert len(values) == STEPS and min(values) < values[0]
        assert losses[stage] == pytest.approx(values, rel=0.02), stage  # kernels differ a little


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_flat_loop_has_the_trainer_s_losses(stage: str, losses, reasoning_file: Path) -> None:
    path = ROOT.parent / "examples" / "train_loop.py"
    assert len(path.read_text().splitlines()) <= 150
    spec = importlib.util.spec_from_file_location("train_loop", path)
    assert spec is not None and spec.loader is not None
    loop = sys.modules["train_loop"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    model = StormForConditionalGeneration.from_pretrained(start(stage))
    processor = AutoProcessor.from_pretrained(start(stage))
    add_latent_tokens(model, processor, 8)
    weight = 0.1 if stage == "stage1" else 0.0
    small = loop.Stage(STEPS, 1e-4, weight, stage == "stage1", batch_size=4, warmup=5)
    flat = loop.train_stage(model, processor, read_rows(reasoning_file), small, num_frames=6)
    assert flat == pytest.approx(losses[stage], rel=2e-3)
