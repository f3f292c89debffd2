import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import left_pad, prompts, tiny_model, tiny_stock_model
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from storm_vlm.model.generation import LatentRolloutMixin
from storm_vlm.model.modeling import StormForConditionalGeneration, enable_latents


def same_tensors(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_checkpoint_loads_everywhere_and_generates_the_same(
    tmp_path: Path, tied: bool
) -> None:
    model, batch = tiny_model(tie_word_embeddings=tied), left_pad(prompts())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["latent_budget"] == model.config.latent_budget
    load: Any = AutoModelForImageTextToText.from_pretrained
    stock, report = load(tmp_path, output_loading_info=True)
    assert type(stock) is Qwen2_5_VLForConditionalGeneration and same_tensors(stock, model)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again = StormForConditionalGeneration.from_pretrained(str(tmp_path))
    assert isinstance(again, LatentRolloutMixin) and same_tensors(again, model)
    assert torch.equal(again.generate(**batch), model.generate(**batch))


def test_every_tensor_of_a_hub_format_checkpoint_arrives(tmp_path: Path) -> None:
    """The released checkpoints name their tensors ``model.layers...`` and ``visual...``."""
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    old = {
        re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", k)): v
        for k, v in model.state_dict().items()
    }
    assert any(k.startswith("model.layers.") for k in old)
    assert not any("language_model" in k for k in old)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same_tensors(StormForConditionalGeneration.from_pretrained(str(tmp_path)), model)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_an_incomplete_checkpoint_is_an_error(tmp_path: Path, change: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if "q_proj.weight" in k)
    tensor = tensors.pop(name) if change == "missing" else tensors[name]
    if change == "unexpected":
        tensors[name.replace("q_proj", "r_proj")] = tensor.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{change}_keys.*_proj"):
        StormForConditionalGeneration.from_pretrained(str(tmp_path))


def test_dtype_and_further_arguments_reach_the_stock_loader(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = StormForConditionalGeneration.from_pretrained(
        str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_enabling_keeps_the_stock_identity_and_is_idempotent() -> None:
    model = tiny_stock_model()
    before = type(model), type(model.model)
    assert enable_latents(model) is model
    first = type(model), type(model.model)
    enable_latents(model)
    assert (type(model), type(model.model)) == first
    for old, new in zip(before, first, strict=True):
        assert new is not old and issubclass(new, old)
        assert (new.__name__, new.__module__) == (old.__name__, old.__module__)
    with pytest.raises(TypeError, match="enable_latents"):
        enable_latents(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="from_pretrained"):
        StormForConditionalGeneration()
