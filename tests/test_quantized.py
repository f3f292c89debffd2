"""Quantized models reason in slots, too. Each test runs where its package is installed."""

import importlib
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from storm_vlm.data.row import Row
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.model.checkpoint import load_processor
from storm_vlm.model.modeling import StormForConditionalGeneration


def torchao() -> TorchAoConfig:
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


CONFIGS = {
    "torchao, 8 bits": ("torchao", torchao),
    "bitsandbytes, 8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes, 4 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_answers_with_its_slots(name: str, reasoning_rows: list[Row]) -> None:
    package, config = CONFIGS[name]
    pytest.importorskip(package)
    rows, path = reasoning_rows[:6], str(shipped("storm"))
    whole = StormPipeline.from_pretrained(path)
    model: Any = StormForConditionalGeneration.from_pretrained(path, quantization_config=config())
    linear = model.model.language_model.layers[0].mlp.up_proj
    assert type(linear) is not torch.nn.Linear or type(linear.weight.data) is not torch.Tensor
    small = StormPipeline(model, load_processor(path))
    answers = list(zip(small.answer_batch(rows), whole.answer_batch(rows), strict=True))
    assert all(mine.slots_used == 8 for mine, _ in answers)
    agreed = sum(mine.text == theirs.text for mine, theirs in answers)
    assert agreed >= (4 if "4 bits" in name else 5)
