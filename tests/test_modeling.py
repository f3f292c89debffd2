import copy
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import left_pad, prompts, tiny_config, tiny_model, tiny_stock_model
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.checkpoints import shipped
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
    assert isinstance(again, StormForConditionalGeneration) and same_tensors(again, model)
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
    assert not isinstance(model, StormForConditionalGeneration)
    assert enable_latents(model) is model and isinstance(model, StormForConditionalGeneration)
    first = type(model), type(model.model)
    enable_latents(model)
    assert (type(model), type(model.model)) == first
    for old, new in zip(before, first, strict=True):
        assert new is not old and issubclass(new, old)
        assert (new.__name__, new.__module__) == (old.__name__, old.__module__)
    other = tiny_model(seed=1)
    assert (type(other), type(other.model)) == first
    with pytest.raises(TypeError, match="enable_latents"):
        enable_latents(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="from_pretrained"):
        StormForConditionalGeneration()


def test_the_class_of_a_model_loads_and_builds_the_like(tmp_path: Path) -> None:
    model: Any = tiny_model()
    model.save_pretrained(tmp_path)
    for other in (type(model).from_pretrained(str(tmp_path)), type(model)(tiny_config())):
        assert type(other) is type(model) and type(other.model) is type(model.model)
        other.load_state_dict(model.state_dict())
        batch = {**left_pad(prompts()), "max_new_tokens": 6}
        assert torch.equal(other.eval().generate(**batch), model.generate(**batch))
        assert other(compute=lambda m: m) is other


class Terse(StormForConditionalGeneration):
    """Someone else's subclass."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)[:, -3:]


@pytest.mark.parametrize("of_the_model", [True, None])
def test_options_of_a_saved_generation_config_are_loaded(tmp_path: Path, of_the_model) -> None:
    model = tiny_model()
    model.generation_config._from_model_config = of_the_model  # as both shipped checkpoints say
    model.generation_config.latent_mode = "off"
    model.generation_config.latent_budget = 3
    model.save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for again in (
        StormForConditionalGeneration.from_pretrained(str(tmp_path)),
        enable_latents(stock),
    ):
        options = again.generation_config
        assert (options.latent_mode, options.latent_budget) == ("off", 3)
        assert not (again.generate(**prompts()[0]) == again.config.latent_pad_token_id).any()


def test_a_subclass_loads_as_itself_and_saves_a_stock_checkpoint(tmp_path: Path) -> None:
    model, batch = tiny_model(), left_pad(prompts())
    model.save_pretrained(tmp_path / "a")
    terse: Any = Terse.from_pretrained(str(tmp_path / "a"))
    assert isinstance(terse, Terse) and isinstance(terse, Qwen2_5_VLForConditionalGeneration)
    assert isinstance(type(terse).from_pretrained(str(tmp_path / "a")), Terse)
    assert isinstance(pickle.loads(pickle.dumps(terse)), Terse)
    assert not isinstance(model, Terse)
    assert torch.equal(terse.generate(**batch), model.generate(**batch)[:, -3:])
    terse.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    with pytest.raises(TypeError, match="Terse"):
        Terse()


def states(model: Any, batch: Any) -> Any:
    output = model.generate(**batch, output_latent_states=True, return_dict_in_generate=True)
    return output.sequences, output.latent_states


def assert_same_states(found: Any, expected: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_models_can_be_pickled_saved_whole_and_copied(tmp_path: Path) -> None:
    model, batch = tiny_model(), left_pad(prompts())
    expected = states(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model),
    ):
        assert type(other) is type(model) and type(other.model) is type(model.model)
        assert_same_states(states(other, batch), expected)
    other.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert type(pickle.loads(pickle.dumps(model.model))) is type(model.model)


def test_a_fresh_process_unpickles_it_and_needs_torch_and_transformers_alone(
    tmp_path: Path,
) -> None:
    """Neither PEFT nor any floor above is imported by `model/`."""
    model, batch = tiny_model(), left_pad(prompts())
    expected = states(model, batch)
    (tmp_path / "model").write_bytes(pickle.dumps((model, batch)))
    code = f"""
import importlib, pickle, pkgutil, sys
sys.modules["peft"] = None
model, batch = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
output = model.generate(**batch, output_latent_states=True, return_dict_in_generate=True)
pickle.dump((output.sequences, output.latent_states), open({str(tmp_path / "out")!r}, "wb"))
import storm_vlm.model
for module in pkgutil.iter_modules(storm_vlm.model.__path__):
    importlib.import_module(f"storm_vlm.model.{{module.name}}")
print(*sorted(name for name in sys.modules if name.startswith("storm_vlm.")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same_states(pickle.loads((tmp_path / "out").read_bytes()), expected)
    assert {name.split(".")[1] for name in run.stdout.split()} == {"model", "errors", "registry"}


def test_ray_gets_the_same_model() -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    model, batch = tiny_model(), left_pad(prompts())
    other = pickle.loads(cloudpickle.dumps(model))
    assert type(other) is type(model)
    assert_same_states(states(other, batch), states(model, batch))


def test_a_pipeline_can_be_pickled(reasoning_rows) -> None:
    pipeline = StormPipeline.from_pretrained(str(shipped("storm")))
    before, after = (
        [(a.text, a.slots_used, a.forced_end) for a in each.answer_batch(reasoning_rows[:4])]
        for each in (pipeline, pickle.loads(pickle.dumps(pipeline)))
    )
    assert before == after and all(slots for _, slots, _ in before)
