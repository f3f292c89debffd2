"""Configs out of files and `key=value`: what people type is what they get, or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storm_vlm.configs import ConfigError, parse_config
from storm_vlm.construction.config import BuildConfig
from storm_vlm.training.config import TrainConfig, load_config

WHOLE = {"model": "m", "data": "d", "output_dir": "o"}


def train_config(*overrides: str, text: str = "") -> TrainConfig:
    return parse_config(TrainConfig, None, [*(f"{k}={v}" for k, v in WHOLE.items()), *overrides])


@pytest.mark.parametrize(
    "text", ["runs/a #1", "1e3", "yes", "~", "a: b", "[x]", "null", "2024-01-01", "a=b", "' '"]
)
def test_strings_stay_strings(text: str) -> None:
    assert train_config(f"output_dir={text}").output_dir == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("num_frames=8", 8),
        ("video_cache_gb=1e-3", 1e-3),
        ("freeze_vision=no", False),
        ("freeze_vision=true", True),
        ("target_cache=null", None),
        ("target_cache=~", "~"),
        ("dtype=float32", "float32"),
        ("lora.r=8", {"r": 8}),
        ("lora={r: 8}", {"r": 8}),
        ("lora.target_modules=[q_proj, v_proj]", {"target_modules": ["q_proj", "v_proj"]}),
        ("training.eval_strategy=no", {"eval_strategy": "no"}),
        ("training.save_strategy=no", {"save_strategy": "no"}),
        ("training.bf16=no", {"bf16": False}),
        ("training.learning_rate=1E-4", {"learning_rate": 1e-4}),
        ("training.run_name=a #1", {"run_name": "a #1"}),
        ("training.run_name=2024-01-01", {"run_name": "2024-01-01"}),
        ("training.run_name=a: b", {"run_name": "a: b"}),
        ("training.run_name='8'", {"run_name": "8"}),
    ],
)
def test_values_are_read_by_the_fields_type(override: str, value: Any) -> None:
    field = override.partition("=")[0].partition(".")[0]
    assert getattr(train_config(override), field) == value


def test_nested_models() -> None:
    config = parse_config(
        BuildConfig, None, ["teacher.model=1e3", "generator_config.steps=4", "filters.blank=null"]
    )
    assert (config.teacher.model, config.filters.blank) == ("1e3", None)
    assert config.generator_config.model_dump()["steps"] == 4
    values = {"teacher.model": "a: b", "workers": 2}
    assert parse_config(BuildConfig, None, values).teacher.model == "a: b"


def test_overrides_go_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "\ufeffmodel: m\ndata: d\noutput_dir: o\nlora:\nmuon: {lr: 1e-2}\n"
        "training: {eval_strategy: no, max_steps: 5}\n"
    )
    config = parse_config(TrainConfig, path, ["lora.r=8", "muon.lr=2e-2", "training.max_steps=6"])
    assert config.lora == {"r": 8} and config.muon == {"lr": 0.02}
    assert config.training == {"eval_strategy": "no", "max_steps": 6}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("oops", "an override is key=value, got 'oops'"),
        ("=3", "an override is key=value"),
        ("training.max_steps=[1", r"'training.max_steps=\[1' cannot be read"),
        ("training.x=!!python/object/apply:os.system [ls]", "cannot be read: could not determine"),
        ("model.foo=1", "model is 'm': it has no part, so model.foo cannot be set"),
        ("method.latent_bugdet=1", "no key 'method.latent_bugdet'; did you mean 'latent_budget'"),
        ("num_frame=1", "there is no key 'num_frame'; did you mean 'num_frames'"),
        ("zzz=1", "there is no key 'zzz'$"),
        ("num_frames=0", "num_frames: .*greater than or equal to 1"),
        ("num_frames=two", "num_frames: .*integer"),
        ("method.alignment_weight=nan", "method.alignment_weight: .*finite"),
        ("method=3", "method: .*dictionary"),
        ("dtype=float23", "dtype: .*'float32'"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        train_config(override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "a config is a mapping of keys to values"),
        ("word\n", "a config is a mapping of keys to values"),
        ("model: a\nmodel: b\n", r"the key 'model' is there twice \(line 2\)"),
        ("training: {a: 1, a: 2}\n", "the key 'a' is there twice"),
        ("model: !!python/name:os.system\n", r"could not determine a constructor .* \(line 1\)"),
        ("model: [1\n", r"cannot read the config .* \(line 2\)"),
        ("? [a]\n: b\n", "cannot read the config"),
        ("model: 3\n", "model: Input should be a valid string; data: Field required"),
        ("3: model\n", "there is no key '3'|Keys should be strings"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(TrainConfig, path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config .*absent"):
        parse_config(TrainConfig, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the config .*directory"):
        parse_config(TrainConfig, tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read the config .*utf-8"):
        parse_config(TrainConfig, tmp_path / "bytes.yaml")


def test_the_last_word_on_the_length_of_a_run_wins(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text("{model: m, data: d, output_dir: o, training: {num_train_epochs: 1}}\n")
    assert load_config(path, ["training.max_steps=10"]).training == {"max_steps": 10}
    path.write_text("{model: m, data: d, output_dir: o, training: {max_steps: 10}}\n")
    assert load_config(path, ["training.num_train_epochs=2"]).training == {"num_train_epochs": 2}
    empty = load_config(path, {"training": None, "training.max_steps": 3})
    assert empty.training == {"max_steps": 3}
