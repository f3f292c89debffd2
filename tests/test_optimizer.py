"""Muon for matrices, NAdamW for the rest: who moves what, and that all of it moves."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_run

from storm_vlm.data.row import read_rows
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.training import arguments
from storm_vlm.training.arguments import training_arguments
from storm_vlm.training.config import ConfigError, Method, TrainConfig
from storm_vlm.training.optimizer import muon_and_nadamw
from storm_vlm.training.train import add_adapters, build_trainer, load_model

MUON = {"algo": "adamuon", "lr": 2e-3}


def config(folder: Path, backbone: str, rows: Path, muon: dict) -> TrainConfig:
    method = Method(latent_budget=3, slot_input="scheduled")
    return tiny_run(folder, backbone, rows, method, 3).model_copy(update={"muon": muon})


def test_each_parameter_has_its_rule_and_moves(
    tmp_path: Path, backbone: str, reasoning_file: Path
) -> None:
    run = config(tmp_path, backbone, reasoning_file, MUON)
    model, processor = load_model(run)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = read_rows(reasoning_file)
    trainer = build_trainer(run, training_arguments(run), model, processor, rows, [])
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    state = trainer.optimizer.optimizer.state  # inside Accelerate's
    by_muon = {n for n, p in model.named_parameters() if p in state and state[p]["use_muon"]}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert by_muon == {n for n in moved if n.endswith(tuple(f"{p}.weight" for p in projections))}
    assert {n for n in moved - by_muon if "norm" in n} and any(
        "embed" in n for n in moved - by_muon
    )
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0, 0.01}
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == [2e-3, 1e-3, 1e-3]  # Muon's own, NAdamW's
    assert all(
        group["lr"] < rate
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True)
    )


def test_without_timm_it_is_said_what_to_do(backbone: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim.muon", None)  # as if it were not installed
    model = StormForConditionalGeneration.from_pretrained(backbone)
    run = TrainConfig(model="", data="", output_dir="unused", training={"use_cpu": True})
    with pytest.raises(ConfigError, match="muon needs timm: pip install timm"):
        muon_and_nadamw(model, training_arguments(run), {})


def test_without_tensorboard_there_are_no_curves_unless_they_are_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(arguments, "is_tensorboard_available", lambda: False)

    def report_to(**settings: object) -> list[str]:
        fields = {"use_cpu": True, **settings}
        run = TrainConfig(model="", data="", output_dir="unused", training=fields)
        return training_arguments(run).report_to

    assert report_to() == []
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        report_to(report_to="tensorboard")


def test_what_is_not_set_is_what_the_arguments_say(backbone: str) -> None:
    model = StormForConditionalGeneration.from_pretrained(backbone)
    run = TrainConfig(
        model="",
        data="",
        output_dir="unused",
        training={"learning_rate": 5e-4, "adam_beta2": 0.95, "use_cpu": True},
    )
    optimizer = muon_and_nadamw(model, training_arguments(run), {})
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    with pytest.raises(ConfigError, match=r"muon: .*speed"):
        muon_and_nadamw(model, training_arguments(run), {"speed": 1})
    with pytest.raises(ConfigError, match=r"muon: .*adamoun"):
        muon_and_nadamw(model, training_arguments(run), {"algo": "adamoun"})


def test_thin_matrices_such_as_adapters_are_muon_s_too(backbone: str) -> None:
    model = StormForConditionalGeneration.from_pretrained(backbone)
    run = TrainConfig(model="", data="", output_dir="unused", training={"use_cpu": True})
    adapted = add_adapters(model, {"r": 2})
    optimizer = muon_and_nadamw(adapted, training_arguments(run), MUON)
    thin = [p for n, p in adapted.named_parameters() if "lora_" in n and p.requires_grad]
    for parameter in thin:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert thin and all(optimizer.state[parameter]["use_muon"] for parameter in thin)
