"""What is loaded is what was in memory: with one table or two, with room in it or none, trained whole or by adapters,
saved, merged, resumed and trained on.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_processor, tiny_run
from tiny_model import left_pad, prompts, tiny_stock_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.checkpoint import CheckpointError, checkpoint_path, load_processor
from storm_vlm.model.modeling import StormForConditionalGeneration, enable_latents
from storm_vlm.model.rollout import rollout
from storm_vlm.model.tokens import SETTINGS, add_latent_tokens, latent_tokens
from storm_vlm.training.config import ConfigError, Method, TrainConfig
from storm_vlm.training.train import lora_targets, train
from storm_vlm.training.trainer import StormTrainer

K = 2
LORA = {"r": 4, "lora_alpha": 16}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ROOM = 300  # rows of a table; the tiny tokenizer has 264 tokens without the latent ones


def save_backbone(folder: Path, tied: bool, rows: int) -> Path:
    """A stock checkpoint that has never met a latent token."""
    model = tiny_stock_model(vocab_size=rows, tie_word_embeddings=tied, intermediate_size=128)
    for name in set(SETTINGS) & set(vars(model.config)):
        delattr(model.config, name)
    model.save_pretrained(folder)
    tiny_processor(with_latent_tokens=False).save_pretrained(folder)
    return folder


@torch.no_grad()
def behaviour(model: Any) -> Tensor:
    """(3, 3, V) of fixed prompts: what opens the segment, what closes it, and what begins the answer."""
    output = rollout(
        model.train(), left_pad(prompts()), K
    )  # no dropout; on CPUs, bitsandbytes rounds anew in eval
    choices = [output.start_logits, output.end_logits, output.logits[:, 0]]
    return torch.stack(choices, 1).float()  # type: ignore[arg-type]


def loaded(folder: Path) -> Any:
    return StormForConditionalGeneration.from_pretrained(str(folder))


@pytest.fixture
def trained(
    monkeypatch, reasoning_file: Path
) -> Callable[[TrainConfig], tuple[Path, Tensor, Tensor]]:
    """Trains, and says how the model in memory behaved before and after."""
    seen: list[Tensor] = []
    fit = StormTrainer.train

    def watched(trainer: StormTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(behaviour(trainer.model))
        done = fit(trainer, *args, **kwargs)
        seen.append(behaviour(trainer.model))
        return done

    def run(config: TrainConfig) -> tuple[Path, Tensor, Tensor]:
        output = train(config)
        return output, seen[-2], seen[-1]

    monkeypatch.setattr(StormTrainer, "train", watched)
    return run


def config(
    folder: Path, model: Path, rows: Path, how: dict[str, Any], **training: Any
) -> TrainConfig:
    method = Method(latent_budget=K, alignment_weight=0)
    run = tiny_run(folder, str(model), rows, method, max_steps=2)
    run.training.update(learning_rate=0.02, per_device_train_batch_size=2, weight_decay=0)
    run.training.update(save_steps=1, max_grad_norm=0, optim="sgd", report_to="none", **training)
    return run.model_copy(update=how)


HOWS = {"full": {}, "lora": {"lora": LORA}, "qlora": {"lora": LORA, "quantization": FOUR_BITS}}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rows", [ROOM, 264], ids=["room", "tight"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_loaded_is_what_was_in_memory(
    tied: bool, rows: int, how: str, tmp_path, reasoning_file, trained
) -> None:
    if how == "qlora":
        pytest.importorskip("bitsandbytes")
    backbone = save_backbone(tmp_path / "backbone", tied, rows)
    run = config(tmp_path / "stage1", backbone, reasoning_file, HOWS[how])
    stage1, before, after = trained(run)
    assert not torch.allclose(before, after, atol=0.01)
    begun = loaded(backbone)
    ids = list(add_latent_tokens(begun, tiny_processor(with_latent_tokens=False), K))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, table)().weight[ids] for model in (begun, loaded(stage1)))
        assert (old != new).any(1)[[0, 2]].all(), "the latent tokens' rows do not train"
    torch.testing.assert_close(behaviour(loaded(stage1)), after, atol=1e-4, rtol=1e-4)

    # Resumed
    (stage1 / "versions.json").unlink()
    shutil.rmtree(stage1 / "checkpoint-2")
    _, _, again = trained(run)
    torch.testing.assert_close(again, after, atol=1e-5, rtol=1e-5)

    # Chained
    stage2, started, ended = trained(config(tmp_path / "stage2", stage1, reasoning_file, HOWS[how]))
    if how != "qlora":  # there, the merged weights are rounded anew
        torch.testing.assert_close(started, after, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(started, ended, atol=0.01)
    final = loaded(stage2)
    torch.testing.assert_close(behaviour(final), ended, atol=1e-4, rtol=1e-4)

    # Merged, and read by the stock class
    final.save_pretrained(tmp_path / "merged")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert stock.config.tie_word_embeddings == tied
    assert latent_tokens(stock.config) == latent_tokens(final.config)
    merged = behaviour(enable_latents(stock))
    torch.testing.assert_close(merged, behaviour(final), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, reasoning_file: Path) -> Path:
    """A folder with a backbone without room, adapters on it, and adapters on those."""
    folder = tmp_path_factory.mktemp("chain")
    backbone = save_backbone(folder / "backbone", False, 264)
    stage1 = train(config(folder / "1", backbone, reasoning_file, HOWS["lora"]))
    train(config(folder / "2", stage1, reasoning_file, HOWS["lora"]))
    return folder


def test_a_base_is_found_from_anywhere(chain: Path, tmp_path, monkeypatch) -> None:
    expected = behaviour(loaded(chain / "2" / "out"))
    shutil.copytree(chain, tmp_path / "moved")
    stage2 = tmp_path / "moved" / "2" / "out"
    settings = json.loads((stage2 / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(chain / "1" / "out")
    settings["base_model_name_or_path"] = "../../1/out"
    (stage2 / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(behaviour(loaded(stage2)), expected)
    assert torch.equal(behaviour(loaded(Path("moved/2/out"))), expected)
    shutil.rmtree(tmp_path / "moved" / "1")
    with pytest.raises(CheckpointError, match=r"need their base: no such folder: \.\./\.\./1/out"):
        loaded(stage2)
    del settings["base_model_name_or_path"]
    (stage2 / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not say of which model"):
        loaded(stage2)


def test_a_checkpoint_of_adapters_is_a_model(chain: Path) -> None:
    stage2 = chain / "2" / "out"
    assert torch.equal(behaviour(loaded(stage2 / "checkpoint-2")), behaviour(loaded(stage2)))


def test_adapters_as_peft_and_transformers_write_them(chain: Path, tmp_path) -> None:
    whole = tmp_path / "whole"
    loaded(chain / "1" / "out").save_pretrained(whole)
    StormPipeline.from_pretrained(str(chain / "1" / "out")).processor.save_pretrained(whole)
    targets = lora_targets(loaded(whole))
    settings = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)

    model = get_peft_model(loaded(whole), settings)
    model.save_pretrained(tmp_path / "peft")
    pipeline = StormPipeline.from_pretrained(str(tmp_path / "peft"), device="cpu")
    assert pipeline.latent_mode == "force"
    torch.testing.assert_close(behaviour(pipeline.model), behaviour(model), atol=1e-4, rtol=1e-4)

    model = loaded(whole)
    model.add_adapter(settings)
    model.save_pretrained(tmp_path / "added")
    assert not (tmp_path / "added" / "config.json").exists()
    again = behaviour(loaded(tmp_path / "added"))
    torch.testing.assert_close(again, behaviour(model), atol=1e-4, rtol=1e-4)


def test_what_is_missing_or_damaged_is_said(chain: Path, tmp_path) -> None:
    def spoiled(name: str) -> Path:
        return Path(shutil.copytree(chain / "1" / "out", tmp_path / name))

    folder = spoiled("without config")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"trains tokens that .*backbone does not know"):
        loaded(folder)
    folder = spoiled("without weights")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be put on .*backbone"):
        loaded(folder)
    folder = spoiled("torn")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot be put on .*backbone"):
        loaded(folder)
    folder = spoiled("of another kind")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "X", "base_model_name_or_path": "."}'
    )
    with pytest.raises(CheckpointError):
        loaded(folder)
    folder = spoiled("half")
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0." not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit .* \(14 tensors"):
        loaded(folder)


@pytest.mark.parametrize("indices", ["list", "table"])
def test_adapters_saved_without_the_output_rows_are_refused(
    indices: str, chain: Path, tmp_path
) -> None:
    """As this package saved them for untied models until it trained both tables."""
    folder = Path(shutil.copytree(chain / "1" / "out", tmp_path / "old"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    ids = next(iter(settings["trainable_token_indices"].values()))
    settings["trainable_token_indices"] = ids if indices == "list" else {"embed_tokens": ids}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"old lacks the latent tokens' rows of lm_head"):
        loaded(folder)


@pytest.mark.parametrize(
    "size", [0, 100, 100_000], ids=["empty", "torn in its head", "torn in its body"]
)
def test_torn_weights_are_named(size: int, tmp_path, backbone: str) -> None:
    folder = shutil.copytree(backbone, tmp_path / "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{folder} cannot be loaded .SafetensorError"):
        loaded(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path, backbone: str) -> None:
    folder = shutil.copytree(backbone, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 mismatched_keys: .*norm\.weight"):
        loaded(folder)


@pytest.mark.parametrize(
    "name",
    ["/no/such", "./runs/typo", "~/typo", "runs\\typo", "runs/typo", "runs/a/b", "typo", ".", ""],
)
def test_a_path_never_goes_to_the_hub(name: str, tmp_path, monkeypatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("the network was asked")

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", connect)
    with pytest.raises(CheckpointError):
        StormPipeline.from_pretrained(name)
    with pytest.raises(CheckpointError):
        load_processor(name)


def test_a_hub_name_is_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_path("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    (tmp_path / "Qwen" / "Qwen2.5-VL-7B-Instruct").mkdir(parents=True)
    here = tmp_path / "Qwen" / "Qwen2.5-VL-7B-Instruct"
    assert checkpoint_path("Qwen/Qwen2.5-VL-7B-Instruct") == str(here)


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": [5]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_other_adapters_come_back_or_are_refused(
    tied: bool, lora, tmp_path, reasoning_file, trained
) -> None:
    backbone = save_backbone(tmp_path / "backbone", tied, 264)
    run = config(tmp_path / "run", backbone, reasoning_file, {"lora": {**LORA, **lora}})
    try:
        output, _, after = trained(run)
    except ConfigError as error:
        assert "lora" in str(error) and "trainable_token_indices" in str(error)
        assert "modules_to_save" not in lora
    else:
        torch.testing.assert_close(behaviour(loaded(output)), after, atol=1e-4, rtol=1e-4)
        loaded(output).save_pretrained(tmp_path / "merged")
        merged = behaviour(loaded(tmp_path / "merged"))
        torch.testing.assert_close(merged, after, atol=1e-4, rtol=1e-4)
