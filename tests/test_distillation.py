"""The self-distilled targets: their teacher, its whitening, and what a resumed run has of them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_run

from storm_vlm.data.collator import StormCollator
from storm_vlm.model.latent import whiten_targets
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.tokens import add_latent_tokens
from storm_vlm.training import distillation
from storm_vlm.training.config import Method
from storm_vlm.training.distillation import DistillationCollator, SelfDistilledTeacher
from storm_vlm.training.train import train

K = 4


@pytest.fixture
def model(backbone: str, processor):
    model = StormForConditionalGeneration.from_pretrained(backbone)
    add_latent_tokens(model, processor, K)
    return model.train()


def test_a_teacher_is_a_slow_average_that_reads_the_thought_video(
    model, processor, reasoning_rows
) -> None:
    rows = reasoning_rows[:4]
    model.model.visual.requires_grad_(False)
    reader = StormCollator(processor, 2 * K, 0)
    method = Method(latent_budget=K, target_source="self_distilled", ema_decay=0.9)
    teacher = SelfDistilledTeacher(model, reader, rows, method)
    collate = DistillationCollator(StormCollator(processor, 6, K), reader)
    batch = collate([(row, None) for row in rows])
    before = teacher.targets(batch["teacher"])
    assert before.shape == (4, K, model.config.text_config.hidden_size)
    raw_method = method.model_copy(update={"target_normalization": "none"})
    plain = SelfDistilledTeacher(model, reader, rows, raw_method)
    raw = plain.targets(batch["teacher"])
    assert not torch.allclose(raw, before, atol=0.1)
    torch.testing.assert_close(whiten_targets(raw, *teacher.whitening), before)
    other = [
        r.model_copy(update={"thought_video": rows[0].thought_video, "question": rows[0].question})
        for r in rows
    ]
    swapped = collate([(row, None) for row in other])
    same = teacher.targets(swapped["teacher"])
    assert torch.allclose(
        same, same[:1].expand_as(same), atol=1e-4
    )  # the clip is not what it reads
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    old = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    assert torch.equal(teacher.targets(batch["teacher"]), before)  # it does not share what trains
    teacher.follow(model)
    own = teacher.model.model.language_model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(own, old + 0.1)
    assert not torch.allclose(teacher.targets(batch["teacher"]), before, atol=1e-3)
    patches = "model.visual.patch_embed.proj.weight"
    assert (
        dict(teacher.model.named_parameters())[patches] is dict(model.named_parameters())[patches]
    )


def test_a_teacher_whitens_anew_what_its_states_have_in_common(
    model, processor, reasoning_rows, monkeypatch
) -> None:
    """A drift of all states is no content. Whitened as at first, it would be nearly all of every target."""
    monkeypatch.setattr(distillation, "WHITENED_EVERY", 10)
    reader = StormCollator(processor, 2 * K, 0)
    method = Method(latent_budget=K, target_source="self_distilled", ema_decay=0.0)
    teacher = SelfDistilledTeacher(model, reader, reasoning_rows, method)
    collate = DistillationCollator(StormCollator(processor, 6, K), reader)
    batch = collate([(row, None) for row in reasoning_rows])

    def in_common() -> float:
        targets = teacher.targets(batch["teacher"])
        return float(targets.mean((0, 1)).square().sum() / targets.square().sum(-1).mean())

    assert in_common() < 0.1
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(torch.tensor([0.0, 2.0]).repeat(64))
    teacher.on_step_end(None, SimpleNamespace(global_step=9), None, model=model)
    assert in_common() > 0.5
    teacher.on_step_end(None, SimpleNamespace(global_step=10), None, model=model)
    assert in_common() < 0.1


def test_a_self_distilled_run_resumes_with_its_teacher(
    tmp_path, backbone, reasoning_file, monkeypatch
) -> None:
    """Killed after step 2 of 3, which is what a lone checkpoint of step 2 looks like."""
    monkeypatch.setattr(distillation, "WHITENED_EVERY", 2)
    method = Method(latent_budget=K, slot_input="scheduled", target_source="self_distilled")
    method = method.model_copy(update={"ema_decay": 0.5})
    whole = tiny_run(tmp_path / "whole", backbone, reasoning_file, method, max_steps=3)
    whole.training.update(save_steps=1)
    output = train(whole)
    expected = (output / "model.safetensors").read_bytes()
    before, after = (load_file(output / f"checkpoint-{n}" / "teacher.safetensors") for n in (2, 3))
    for name, weight in StormForConditionalGeneration.from_pretrained(output).named_parameters():
        if name in after:
            torch.testing.assert_close(after[name], (before[name] + weight.detach()) / 2)
    assert "model.language_model.norm.weight" in after
    history = json.loads((output / "log_history.json").read_text())
    assert sum("alignment_loss" in entry for entry in history) == 3
    resumed = whole.model_copy(update={"output_dir": str(tmp_path / "resumed")})
    shutil.copytree(
        Path(whole.output_dir) / "checkpoint-2", Path(resumed.output_dir) / "checkpoint-2"
    )
    assert (train(resumed) / "model.safetensors").read_bytes() == expected
