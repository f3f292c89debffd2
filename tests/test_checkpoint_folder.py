"""What a saved checkpoint's folder holds besides weights, and how one is made from a base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import run_storm
from safetensors.torch import load_file
from tiny import tiny_processor, tiny_run
from tiny_model import tiny_config, tiny_model
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)

from storm_vlm.data.row import write_rows
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.tokens import LATENT_TOKENS
from storm_vlm.training.config import Method
from storm_vlm.training.train import train


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint in five shards, with a sampling generation config and no spare row."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    torch.manual_seed(0)
    config = tiny_config(vocab_size=264)
    for name in [name for name in vars(config) if name.startswith("latent_")]:
        delattr(config, name)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=[258, 256], do_sample=True)
    model.save_pretrained(folder, max_shard_size="200KB")
    tiny_processor(with_latent_tokens=False).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_base_becomes_a_storm_checkpoint(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_storm("init", base, out, "--latent-budget", 6, "--num-frames", 4)
    assert done.exit_code == 0, done.output
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        assert len(after[name]) == len(tensor) + 3 * (len(tensor) == 264)
    config = json.loads((out / "config.json").read_text())
    assert (config["latent_budget"], config["num_frames"]) == (6, 4)
    assert config["text_config"]["vocab_size"] == 267
    assert AutoProcessor.from_pretrained(out).tokenizer.convert_tokens_to_ids(
        list(LATENT_TOKENS)
    ) == [264, 265, 266]
    files = [len(list(folder.glob("*.safetensors"))) for folder in (base, out)]
    assert files[1] == files[0] > 2 and (out / "model.safetensors.index.json").exists()
    assert (out / "custom_generate/generate.py").exists()
    model = StormForConditionalGeneration.from_pretrained(str(out))
    assert model.generation_config.eos_token_id == [258, 256]
    one = tmp_path / "one"
    assert run_storm("init", base, one, "--max-shard-size", "1GB").exit_code == 0
    assert len(list(one.glob("*.safetensors"))) == 1 and weights(one).keys() == after.keys()


def test_init_refuses_what_it_would_overwrite(base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    before = {file: file.stat().st_mtime_ns for file in base.iterdir()}
    for out, words in ((base, "is read"), (link, "is read"), (shipped("storm"), "holds a model")):
        done = run_storm("init", base, out)
        assert done.exit_code == 1 and words in done.stderr
    assert before == {file: file.stat().st_mtime_ns for file in base.iterdir()}
    done = run_storm("init", tmp_path / "absent", tmp_path / "out")
    assert done.exit_code == 1 and "no such folder" in done.stderr


def test_the_card_of_a_saved_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.name_or_path = "Qwen/Qwen2.5-VL-3B-Instruct"
    model.save_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine/README.md").read_text()
    assert front_matter(card)["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert "trust_remote_code=True" in card and "4 latent slots" in card and "No result" in card
    (tmp_path / "mine/README.md").write_text("my own words")
    model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine/README.md").read_text() == "my own words"
    # Where transformers uploads, it lays a form to be filled in over it.
    uploaded = {}

    def upload(self: Any, folder: Any, *_: Any, **__: Any) -> None:
        uploaded.update({f.name: f.read_text() for f in Path(folder).rglob("*.[mp][dy]")})

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    (tmp_path / "mine/README.md").write_text("**License:** [More Information Needed]")
    model._upload_modified_files(tmp_path / "mine", "org/name", files_timestamps={})
    assert uploaded["README.md"] == card and "def generate" in uploaded["generate.py"]


def test_the_card_of_a_run_tells_its_stages_and_results(
    reasoning_rows: list, backbone: str, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reasoning_rows[:4]) or tmp_path / "rows.jsonl"
    first = tiny_run(tmp_path / "a", backbone, data, Method(alignment_weight=0.3), 1)
    train(first)
    second = tiny_run(tmp_path / "b", first.output_dir, data, Method(alignment_weight=0.0), 1)
    out = train(second.model_copy(update={"lora": {"r": 2}}))
    card = (out / "README.md").read_text()
    assert "Made from `backbone`" in card and str(tmp_path) not in card
    assert card.index("alignment_weight: 0.3") < card.index("r: 2")
    assert "trust_remote_code" not in card  # transformers would load the base's rollout, if any
    run = tmp_path / "run"
    done = run_storm("evaluate", out, data, "--out", run, "--reliance-rows", 2)
    assert done.exit_code == 0, done.output
    done = run_storm("card", out, run)
    assert done.exit_code == 0, done.output
    card = (out / "README.md").read_text()
    assert "## Results" in card and "95% bootstrap interval" in card and "Latent reliance" in card
    assert "No result" not in card and "alignment_weight: 0.3" in card
    done = run_storm("card", tmp_path)
    assert done.exit_code == 1 and "no config.json" in done.stderr
