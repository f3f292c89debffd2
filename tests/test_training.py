"""Training: the losses are the paper's, what should move moves, and every shipped config runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_run
from tiny_backbones import tokenizer
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from storm_vlm.data.collator import LAYOUT, StormCollator, VideoInputs
from storm_vlm.data.decode import VideoError
from storm_vlm.data.row import Row, RowError, read_rows, write_rows
from storm_vlm.data.video import Clip, read_frames, read_future, write_video
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.micro_config import MICRO_CONFIGS
from storm_vlm.lab.world.clips import build_world
from storm_vlm.model.latent import alignment_loss, pool_targets, target_whitening, whiten_targets
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.rollout import rollout
from storm_vlm.model.tokens import add_latent_tokens, latent_tokens
from storm_vlm.training import targets as targets_module
from storm_vlm.training.arguments import training_arguments
from storm_vlm.training.config import ConfigError, Method, TargetSource, TrainConfig, load_config
from storm_vlm.training.row_lengths import LengthSampler, row_lengths
from storm_vlm.training.targets import Targets, alignment_targets
from storm_vlm.training.train import train
from storm_vlm.training.trainer import (
    RowDataset,
    StormTrainer,
    batch_counts,
    boundary_loss,
    storm_rollout,
)

K = 4
STAGES = {
    "sft": Method(latent_budget=0, alignment_weight=0),
    "pause": Method(latent_budget=K, alignment_weight=0, slot_input="pause"),
    "target": Method(latent_budget=K, slot_input="target"),
    "scheduled": Method(latent_budget=K, slot_input="scheduled"),
    "rollout": Method(latent_budget=K, slot_input="rollout"),
    "stage2": Method(latent_budget=K, alignment_weight=0),
}

WHITENED = Method(latent_budget=K)
PLAIN = Method(latent_budget=K, target_normalization="none")


def replace(method: Method, **changes: Any) -> Method:
    return method.model_copy(update=changes)


@pytest.fixture
def model(backbone: str, processor):
    model = StormForConditionalGeneration.from_pretrained(backbone)
    add_latent_tokens(model, processor, K)
    return model.train()


@pytest.fixture
def batch(model, processor, reasoning_rows: list[Row]) -> dict:
    rows = reasoning_rows[:3]
    targets = alignment_targets(model, processor, rows, WHITENED)
    model.train()
    return StormCollator(processor, 6, K)(list(zip(rows, targets, strict=True)))


def losses(model, method: Method, batch: dict) -> torch.Tensor:
    trainer = StormTrainer(model=model, method=method, args=quiet_arguments())
    return trainer.compute_loss(model, batch)


def trainer_losses(model, method: Method, batch: dict) -> dict[str, torch.Tensor]:
    trainer = StormTrainer(model=model, method=method, args=quiet_arguments())
    return trainer._losses(model, batch, batch_counts(batch), 0.0)


def quiet_arguments():
    return training_arguments(
        TrainConfig(model="", data="", output_dir="unused", training={"use_cpu": True})
    )


def test_targets_are_the_pooled_tokens_of_the_vision_tower(
    model, processor, reasoning_rows
) -> None:
    rows = reasoning_rows[:3]
    raw = alignment_targets(model, processor, rows, PLAIN)
    for row, target in zip(rows, raw, strict=True):
        video = VideoInputs(processor, 2 * K).get(row.thought_video.path)  # type: ignore[union-attr]
        with torch.no_grad():
            (tokens,) = model.model.get_video_features(
                video["pixel_values_videos"], video["video_grid_thw"]
            ).pooler_output
        assert torch.allclose(target, pool_targets(tokens, K), atol=1e-5)
        # With two frames a slot and whole grids, slot k is the mean over grid k: step k of the world.
        assert torch.allclose(target, tokens.view(K, -1, tokens.shape[-1]).mean(1), atol=1e-5)
    white = torch.stack(list(alignment_targets(model, processor, rows, WHITENED)))  # type: ignore[arg-type]
    assert torch.allclose(white.square().mean(-1), torch.ones(()), atol=1e-4)


def test_the_same_frames_are_pooled_to_more_or_fewer_slots_or_not_at_all(
    model, processor, reasoning_rows
) -> None:
    """Paper, Table 5: K = 4, 8, 16, and as many slots as there are visual tokens."""

    def targets(budget: int, frames: int) -> torch.Tensor:
        method = replace(PLAIN, latent_budget=budget, target_frames=frames)
        return torch.stack(list(alignment_targets(model, processor, reasoning_rows[:1], method)))[0]  # type: ignore[arg-type]

    eight = targets(8, 16)
    assert torch.equal(eight, targets(8, Method(latent_budget=8).num_target_frames))
    torch.testing.assert_close(targets(4, 16), eight.view(4, 2, -1).mean(1))
    torch.testing.assert_close(targets(16, 16).view(8, 2, -1).mean(1), eight)
    video = VideoInputs(processor, 2).get(reasoning_rows[0].thought_video.path)  # type: ignore[union-attr]
    with torch.no_grad():
        (tokens,) = model.model.get_video_features(
            video["pixel_values_videos"], video["video_grid_thw"]
        ).pooler_output
    torch.testing.assert_close(targets(len(tokens), 2), tokens)
    assert Method(latent_budget=16, target_frames=2).num_target_frames == 2


def test_a_row_of_its_own_number_of_slots_is_aligned_with_as_many_steps(
    model, processor, reasoning_rows
) -> None:
    """As if K were three; nothing changes for other rows."""
    rows = reasoning_rows[:2]
    few = rows[0].model_copy(update={"slots": 3})
    short, whole = alignment_targets(model, processor, [few, rows[1]], PLAIN)
    budget = replace(PLAIN, latent_budget=3)
    (as_k,) = alignment_targets(model, processor, rows[:1], budget)
    _, unchanged = alignment_targets(model, processor, rows, PLAIN)
    assert short is not None and short.shape[0] == 3
    assert torch.equal(short, as_k) and torch.equal(whole, unchanged)  # type: ignore[arg-type]

    for slot_input in ("target", "rollout"):
        batch = StormCollator(processor, 6, K)([(few, short)])
        alone = StormCollator(processor, 6, 3)([(few, short)])
        loss = losses(model, replace(PLAIN, slot_input=slot_input), batch)
        torch.testing.assert_close(
            loss, losses(model, replace(budget, slot_input=slot_input), alone)
        )
        loss.backward()
    mixed = StormCollator(processor, 6, K)([(few, short), (rows[1], whole)])
    other = StormCollator(processor, 6, K)([(rows[1], whole)])
    one = StormCollator(processor, 6, K)([(few, short)])
    for term in ("alignment_loss", "boundary_loss"):
        both, first, second = (
            trainer_losses(model, PLAIN, part)[term] for part in (mixed, one, other)
        )
        torch.testing.assert_close(both, (first + second) / 2)


def test_rows_without_a_thought_video_in_stage_one_are_told(
    tmp_path, backbone, reasoning_rows, caplog
) -> None:
    rows = [reasoning_rows[0].model_copy(update={"thought_video": None}), *reasoning_rows[1:4]]
    for slot_input, told in (("target", True), ("rollout", False)):
        run = tiny_run(tmp_path / slot_input, backbone, tmp_path, STAGES[slot_input], max_steps=1)
        caplog.clear()
        train(run, rows)
        assert ("1 of 4 rows have no thought video" in caplog.text) == told


def test_rows_of_more_slots_than_the_model_are_refused(backbone, reasoning_rows, tmp_path) -> None:
    rows = [row.model_copy(update={"slots": K + 1}) for row in reasoning_rows]
    config = TrainConfig(model=backbone, data="", output_dir=str(tmp_path / "run"), method=PLAIN)
    with pytest.raises(RowError, match=f"it takes {K + 1} slots, and method.latent_budget is {K}"):
        train(config, rows)


def test_rows_without_thought_video_have_no_target(model, processor, reasoning_rows) -> None:
    rows = [reasoning_rows[0], reasoning_rows[1].model_copy(update={"thought_video": None})]
    targets = alignment_targets(model, processor, rows, PLAIN)
    assert targets[0] is not None and targets[1] is None
    batch = StormCollator(processor, 6, K)(list(zip(rows, targets, strict=True)))
    assert batch["target_mask"].tolist() == [True, False]
    model.train()
    for slot_input in ("target", "scheduled", "rollout"):
        losses(model, Method(latent_budget=K, slot_input=slot_input), batch).backward()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no row has a thought video"):
        alignment_targets(model, processor, rows[1:], PLAIN)


def test_targets_are_kept_on_disk_until_anything_they_depend_on_changes(
    model, processor, reasoning_rows, tmp_path
) -> None:
    rows, cache = reasoning_rows[:3], tmp_path / "targets"
    tower = model.model.visual
    calls = []
    tower.register_forward_hook(lambda *_: calls.append(1))

    def targets(budget: int = K) -> torch.Tensor:
        calls.clear()
        return torch.stack(
            list(
                alignment_targets(
                    model, processor, rows, replace(PLAIN, latent_budget=budget), cache
                )
            )
        )  # type: ignore[arg-type]

    first = targets()
    assert calls and len(list(cache.glob("targets/*/*"))) == 3
    assert torch.equal(targets(), first) and not calls
    (together,) = cache.glob("target_sets/*/*")
    for file, damage in [
        (f, d) for f in (together, *cache.glob("targets/*/*")) for d in (40, 999999)
    ]:
        for lie in (file.read_bytes()[:-damage], b"\xff" * 400):  # damaged: made again
            file.write_bytes(lie)
            together.unlink(missing_ok=file != together)
            assert torch.equal(targets(), first) and bool(calls) == (file != together)
    targets(K + 1)
    assert calls
    with torch.no_grad():
        tower.patch_embed.proj.weight.mul_(1.1)
    assert not torch.equal(targets(), first) and calls
    gone = rows[0].thought_video.model_copy(update={"path": str(tmp_path / "gone.mp4")})  # type: ignore[union-attr]
    rows = [rows[0].model_copy(update={"thought_video": gone}), *rows[1:]]
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        targets()


def test_stage_one_is_answer_plus_a_tenth_of_alignment(model, batch) -> None:
    method = Method(latent_budget=K, slot_input="target", boundary_weight=0)
    output = rollout(model, batch, K, batch["targets"])
    answer = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
    alignment = (output.states - batch["targets"]).square().mean()
    expected = answer + 0.1 * alignment
    assert losses(model, method, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    both = losses(model, method.model_copy(update={"boundary_weight": 1.0}), batch)
    assert both.item() == pytest.approx((expected + boundary_loss(model, output)).item(), rel=1e-5)


def test_boundary_loss_teaches_to_open_to_go_on_and_to_close(model, batch) -> None:
    tokens = latent_tokens(model.config)
    output = rollout(model, batch, K)
    p_start = output.start_logits.softmax(-1)[:, tokens.start]
    p_end = output.end_logits.softmax(-1)[:, tokens.end]
    p_stop = model.lm_head(output.states[:, 1:]).softmax(-1)[..., tokens.end]
    expected = -(p_start.log() + p_end.log()).mean() / 2 - torch.log1p(-p_stop).mean()
    torch.testing.assert_close(boundary_loss(model, output), expected, rtol=1e-4, atol=1e-5)


def test_without_slots_the_loss_is_the_stock_model_s(model, processor, reasoning_rows) -> None:
    rows = reasoning_rows[:1]
    batch = StormCollator(processor, 6, 0)(rows)
    ids = torch.cat([batch["input_ids"], batch["labels"]], 1)
    types = F.pad(batch["mm_token_type_ids"], (0, batch["labels"].shape[1]))
    labels = F.pad(batch["labels"], (batch["input_ids"].shape[1], 0), value=-100)
    pixels = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    stock = model(
        input_ids=ids,
        mm_token_type_ids=types,
        labels=labels,
        **{name: batch[name] for name in pixels},
    ).loss
    ours = losses(model, Method(latent_budget=0, alignment_weight=0), batch)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-5)


def test_what_slots_are_fed_with(model, batch) -> None:
    """`target` and `rollout` differ, `scheduled` goes from the one to the other; pause slots see no target."""
    out = {
        name: storm_rollout(model, batch, method)
        for name, method in STAGES.items()
        if name != "sft"
    }
    assert torch.allclose(out["rollout"].logits, out["stage2"].logits)
    assert not torch.allclose(out["rollout"].logits, out["target"].logits, atol=1e-3)
    assert not torch.allclose(out["pause"].logits, out["rollout"].logits, atol=1e-3)
    assert torch.allclose(out["scheduled"].logits, out["target"].logits)
    late = storm_rollout(model, batch, STAGES["scheduled"], progress=1.0)
    assert torch.allclose(late.logits, out["rollout"].logits, atol=1e-4)
    changed = {**batch, "targets": batch["targets"] + 1}
    again = storm_rollout(model, changed, STAGES["target"])
    assert not torch.allclose(again.logits, out["target"].logits, atol=1e-3)
    assert torch.allclose(
        storm_rollout(model, changed, STAGES["pause"]).logits, out["pause"].logits
    )


def test_a_model_trained_with_pause_slots_is_asked_with_pause_slots(
    model, processor, batch, reasoning_rows
) -> None:
    model.config.latent_pause = True
    trained = storm_rollout(model, batch, STAGES["pause"]).states
    asked = StormCollator(processor, 6, K).collate_prompts(reasoning_rows[:3], "force")
    options = {"latent_mode": "force", "output_latent_states": True, "do_sample": False}
    output = model.eval().generate(
        **asked, **options, max_new_tokens=K + 2, return_dict_in_generate=True
    )
    assert output.latent_counts.tolist() == [K] * 3
    torch.testing.assert_close(output.latent_states, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slot_input", ["target", "scheduled", "rollout"])
def test_every_batch_takes_as_many_passes_whichever_rows_lack_targets(
    slot_input, model, processor, reasoning_rows
) -> None:
    """Else the processes of a sharded run would wait for each other."""
    rows = [*reasoning_rows[:2], reasoning_rows[2].model_copy(update={"thought_video": None})]
    method = Method(latent_budget=K, slot_input=slot_input)
    pairs = list(zip(rows, alignment_targets(model, processor, rows, WHITENED), strict=True))
    passes = []
    model.model.language_model.register_forward_hook(lambda *_: passes.append(1))

    def count(trained_on: int, part: slice) -> int:
        ours = rows[:trained_on]
        data = RowDataset(ours, alignment_targets(model, processor, ours, PLAIN))
        arguments = quiet_arguments()
        trainer = StormTrainer(model=model, method=method, args=arguments, train_dataset=data)
        passes.clear()
        trainer.compute_loss(model, StormCollator(processor, 6, K)(pairs[part]))
        return len(passes)

    found = [count(3, part) for part in (slice(0, 2), slice(1, 3), slice(2, 3))]
    assert found == [K + 1] * 3
    assert count(2, slice(0, 2)) == (K + 1 if slot_input == "rollout" else 1)


def test_detached_feedback_is_another_gradient(model, batch) -> None:
    def gradient(detach: bool) -> torch.Tensor:
        model.zero_grad()
        method = Method(latent_budget=K, alignment_weight=0, detach_feedback=detach)
        losses(model, method, batch).backward()
        return model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone()

    assert not torch.allclose(gradient(True), gradient(False), rtol=1e-2)


@pytest.mark.parametrize("name", STAGES)
def test_what_should_move_moves(
    name: str, tmp_path: Path, backbone: str, reasoning_file: Path
) -> None:
    method = STAGES[name]
    output = train(tiny_run(tmp_path, backbone, reasoning_file, method, max_steps=2))
    before = StormForConditionalGeneration.from_pretrained(backbone).state_dict()
    after = StormForConditionalGeneration.from_pretrained(str(output))
    moved = {n for n, p in after.state_dict().items() if not torch.equal(p, before[n])}
    frozen = {n for n in before if n.startswith("model.visual.")}
    assert moved == set(before) - frozen, moved ^ (set(before) - frozen)
    assert after.config.latent_budget == method.latent_budget if method.latent_budget else True
    assert getattr(after.config, "latent_pause", False) == (name == "pause")
    history = json.loads((output / "log_history.json").read_text())
    assert any("answer_loss" in entry for entry in history)
    if method.alignment_weight:
        assert any(
            {"alignment_loss", f"slot_cosine/{K}", f"slot_norm/{K}"} <= set(e) for e in history
        )


def test_a_run_whose_latents_get_no_gradient_stops_at_once(
    tmp_path, backbone, reasoning_file
) -> None:
    """An attention that cuts keys and values off, as a dropped or detached cache would."""

    def cut(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(module, query, key.detach(), value.detach(), *args, **kwargs)

    AttentionInterface.register("cut", cut)
    run = tiny_run(tmp_path / "run", backbone, reasoning_file, STAGES["stage2"], max_steps=1)
    with pytest.raises(RuntimeError, match="no gradient of the answer reaches latent slot 1"):
        train(run.model_copy(update={"attn_implementation": "cut"}))


def test_the_same_seed_gives_the_same_weights(tmp_path, backbone, reasoning_file) -> None:
    for lora, file in ((None, "model"), ({"r": 4}, "adapter_model")):
        weights = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            folder = tmp_path / f"{file}-{noise}"
            run = tiny_run(folder, backbone, reasoning_file, STAGES["scheduled"], max_steps=2)
            output = train(run.model_copy(update={"lora": lora}))
            weights.append((output / f"{file}.safetensors").read_bytes())
        assert weights[0] == weights[1]


def test_a_finished_run_is_left_as_it_is(tmp_path, backbone, reasoning_file) -> None:
    run = tiny_run(tmp_path, backbone, reasoning_file, STAGES["sft"], max_steps=1)
    weights = train(run) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    train(run)
    assert weights.stat().st_mtime_ns == written
    other = run.model_copy(update={"num_frames": 5})
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(num_frames\)"):
        train(other)


def test_alignment_is_learned(tmp_path, backbone, reasoning_file) -> None:
    """With the squared distance, a few steps on a handful of rows bring the states nearer to their targets."""
    method = STAGES["target"].model_copy(update={"alignment_reduction": "sum"})
    output = train(tiny_run(tmp_path, backbone, reasoning_file, method, max_steps=25))
    history = json.loads((output / "log_history.json").read_text())
    aligned = [entry["alignment_loss"] for entry in history if "alignment_loss" in entry]
    assert aligned[-1] < 0.9 * aligned[0]


def test_lora_trains_adapters_and_latent_embeddings_and_comes_back_merged(
    tmp_path, backbone, reasoning_file, processor
) -> None:
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"}
    run = tiny_run(tmp_path / "run", backbone, reasoning_file, STAGES["rollout"], max_steps=3)
    output = train(run.model_copy(update={"lora": lora}))
    assert not (output / "model.safetensors").exists()
    tuned, base = (
        StormForConditionalGeneration.from_pretrained(str(p)) for p in (output, backbone)
    )
    tokens = add_latent_tokens(base, processor, K)  # as the run began
    assert latent_tokens(tuned.config) == tokens and tuned.config.latent_budget == K
    before, after = base.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    for name, weight in after.items():
        same = torch.equal(weight, before[name])
        if name.startswith("model.visual") or "norm" in name:
            assert same, name
        elif "_proj" in name and name.endswith("weight"):
            assert not same, name
    table, old = (m.get_input_embeddings().weight for m in (tuned, base))
    moved = (table != old).any(1).nonzero().flatten().tolist()
    assert moved == sorted(tokens)
    with pytest.raises(ConfigError, match=r"lora: .*rank"):
        train(run.model_copy(update={"lora": {"rank": 4}, "output_dir": str(tmp_path / "other")}))


RECIPES = Path(__file__).parent.parent / "recipes"
CONFIGS = sorted([*MICRO_CONFIGS.glob("*.yaml"), *RECIPES.glob("*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_config_trains(path: Path, tmp_path, backbone, reasoning_file) -> None:
    overrides = [
        f"model={backbone}",
        f"data={reasoning_file}",
        f"output_dir={tmp_path / 'out'}",
        "training.max_steps=1",
        "training.per_device_train_batch_size=2",
        "training.disable_tqdm=true",
        "training.use_cpu=true",
        "training.bf16=false",
        "training.dataloader_num_workers=0",
        "dtype=float32",
        "num_frames=6",
    ]
    train(load_config(path, overrides))


def test_bad_configs_are_refused_by_name_and_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: m\ndata: d\noutput_dir: o\nmethod: {latent_bugdet: 8}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: .*method\.latent_bugdet"):
        load_config(path)
    path.write_text("model: m\ndata: d\noutput_dir: o\ntraining: {lerning_rate: 1}\n")
    with pytest.raises(ConfigError, match="lerning_rate"):
        training_arguments(load_config(path))
    path.write_text("model: m\ndata: d\noutput_dir: o\ntraining: {learning_rate: 1e-4}\n")
    config = load_config(path, ["training.weight_decay=1E-2", "training.max_steps=10"])
    assert config.training == {"learning_rate": 1e-4, "weight_decay": 0.01, "max_steps": 10}
    with pytest.raises(ValueError, match="pause slots"):
        Method(slot_input="pause")


def test_alignment_of_no_row_is_zero_with_a_graph() -> None:
    states = torch.randn(2, K, 3, requires_grad=True)
    loss = alignment_loss(states, torch.zeros(2, K, 3), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and states.grad is not None


def test_every_target_source_reads_what_it_says(model, processor, tmp_path) -> None:
    """The same scenes, once with clips that end where the question is asked, once with clips that go on."""
    rows = read_rows(build_world(tmp_path, "reasoning", "train", 4))
    longer = read_rows(build_world(tmp_path, "reasoning", "train", 4, continued=True))

    def targets(source: TargetSource, of: list[Row] = longer) -> torch.Tensor:
        # One cache for all: some sources read the same file.
        method = replace(PLAIN, latent_budget=8, target_source=source)
        return torch.stack(list(alignment_targets(model, processor, of, method, tmp_path / "kept")))  # type: ignore[arg-type]

    collator = StormCollator(processor, 6, K)
    for short, long in zip(rows, longer, strict=True):  # the model sees the same of both
        seen = [collator.videos.get(r.video, r.start, r.end) for r in (short, long)]
        difference = seen[0]["pixel_values_videos"] - seen[1]["pixel_values_videos"]
        assert difference.abs().mean() < 0.05  # but for the codec
    oracle, future = targets("thought_video"), targets("future")
    assert torch.allclose(oracle, targets("thought_video", rows), atol=1e-5)
    # Slot k of the future is step k after the clip; of the thought video it is step k - 1, in a spotlight.
    frames = read_future(longer[0].video, 16, longer[0].end).frames  # type: ignore[arg-type]
    assert len(frames) == 16 and not torch.allclose(future, oracle, atol=0.1)
    first = VideoInputs(processor, 2).process(Clip(frames[:2], np.array([0, 0.25]), ""))
    with torch.no_grad():
        (tokens,) = model.model.get_video_features(
            first["pixel_values_videos"], first["video_grid_thw"]
        ).pooler_output
    assert torch.allclose(future[0, 0], tokens.mean(0), atol=1e-4)
    keyframe = VideoInputs(processor, 2).process(
        read_frames(longer[0].video, longer[0].keyframes * 2)
    )
    with torch.no_grad():
        (tokens,) = model.model.get_video_features(
            keyframe["pixel_values_videos"], keyframe["video_grid_thw"]
        ).pooler_output
    assert torch.allclose(targets("keyframes")[0], pool_targets(tokens, 8), atol=1e-4)
    shuffled = targets("shuffled")
    for index, target in enumerate(shuffled):
        nearest = (oracle - target).abs().amax((1, 2)).argmin()
        assert nearest != index and torch.equal(oracle[nearest], target)
    with pytest.raises(ValueError, match="no row has an `end`"):
        targets("future", rows)
    with pytest.raises(ValueError, match="target_source none"):
        Method(target_source="none")


def test_each_keyframe_of_a_row_is_a_slot_in_the_order_of_time(
    model, processor, reasoning_rows
) -> None:
    """Each fills a temporal grid of its own, whatever order the row names them in."""
    rows = [reasoning_rows[0].model_copy(update={"keyframes": (1.0, 0.0, 0.5)}), reasoning_rows[1]]
    targets = alignment_targets(
        model,
        processor,
        rows,
        replace(PLAIN, latent_budget=3, target_source="keyframes", target_frames=2),
    )
    for slot, time in enumerate((0.0, 0.5, 1.0)):
        alone = VideoInputs(processor, 2).process(read_frames(rows[0].video, [time, time]))
        with torch.no_grad():
            (tokens,) = model.model.get_video_features(
                alone["pixel_values_videos"], alone["video_grid_thw"]
            ).pooler_output
        assert torch.allclose(targets[0][slot], tokens.mean(0), atol=1e-4)  # type: ignore[index]


def test_targets_for_fewer_slots_are_others_though_made_from_the_same_frames(
    model, processor, reasoning_rows, tmp_path
) -> None:
    """As runs have them that set `target_frames` and share a folder."""
    rows = reasoning_rows[:2]
    for budget in (2, 4, 2):
        method = replace(PLAIN, latent_budget=budget, target_frames=8)
        kept = alignment_targets(model, processor, rows, method, tmp_path)
        fresh = alignment_targets(model, processor, rows, method)
        assert [t.shape[0] for t in kept] == [budget] * 2  # type: ignore[union-attr]
        assert all(map(torch.equal, kept, fresh))  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [3, 1024])
def test_targets_are_whitened_as_if_all_were_in_memory(chunk: int, tmp_path, monkeypatch) -> None:
    """Over the rows: what two of them share counts twice, what none has not at all."""
    monkeypatch.setattr(targets_module, "CHUNK", chunk)
    pooled = np.random.default_rng(0).normal(1, [1, 2, 3, 4, 5], (40, K, 5)).astype(np.float32)
    np.save(tmp_path / "pooled.npy", pooled)
    mapped = np.load(tmp_path / "pooled.npy", mmap_mode="r")
    places = [None, 7, 7, *range(30), None]
    targets = Targets(mapped, places, "whiten")
    assert len(targets) == 34 and not targets.complete and Targets(mapped, [1], "none").complete
    rows = torch.from_numpy(pooled[[place for place in places if place is not None]])
    expected = whiten_targets(rows, *target_whitening(rows))
    got = torch.stack([target for target in targets if target is not None])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert [index for index, target in enumerate(targets) if target is None] == [0, 33]
    plain = Targets(mapped, places, "none")[1]
    assert plain is not None and torch.equal(plain, torch.from_numpy(pooled[7]))
    few = Targets(mapped, places, "whiten", np.arange(40) % K + 1)
    there = [place for place in places if place is not None]
    used = torch.cat([torch.from_numpy(pooled[place, : place % K + 1]) for place in there])
    got = torch.cat([target for target in few if target is not None])
    expected = whiten_targets(used, *target_whitening(used))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_evaluations_answer_as_inference_does(lora, tmp_path, backbone, reasoning_file) -> None:
    rows = [r.model_copy(update={"split": "validation"}) for r in read_rows(reasoning_file)[:3]]
    data = tmp_path / "rows.jsonl"
    write_rows(data, [*read_rows(reasoning_file)[3:], *rows])
    run = tiny_run(tmp_path, str(shipped("storm")), data, Method(), max_steps=2)
    run = run.model_copy(update={"lora": lora})
    run.training.update(eval_strategy="steps", eval_steps=1, learning_rate=1e-5)
    run.training.update(train_sampling_strategy="group_by_length")
    output = train(run)
    said = json.loads((output / "samples" / "step-2.json").read_text())
    answers = StormPipeline.from_pretrained(str(output), device="cpu").answer_batch(rows)
    assert [one["said"] for one in said] == [answer.text for answer in answers]
    assert all(one["said"] for one in said)
    assert (output / "samples" / "step-1.json").exists()
    history = json.loads((output / "log_history.json").read_text())
    assert any("eval_sample_accuracy" in entry for entry in history)
    assert sum("eval_loss" in entry for entry in history) == 2
    assert list((output / "runs").rglob("events.out.tfevents.*"))  # TensorBoard, by default
    bad = tiny_run(tmp_path / "bad", backbone, reasoning_file, STAGES["sft"], max_steps=1)
    bad.training.update(eval_strategy="steps", eval_steps=1)
    with pytest.raises(ConfigError, match="no row of the split 'validation'"):
        train(bad)


def test_rows_of_about_the_same_length_come_together(processor, reasoning_rows, tmp_path) -> None:
    write_video(tmp_path / "short.mp4", np.zeros((2, 128, 128, 3), np.uint8), 4.0)
    short = [r.model_copy(update={"video": str(tmp_path / "short.mp4")}) for r in reasoning_rows]
    rows = [row for pair in zip(reasoning_rows, short, strict=True) for row in pair]
    lengths = row_lengths(rows, processor, 6)
    collator = StormCollator(processor, 6, K)
    template = None
    for row, length in zip(rows[:4], lengths, strict=False):  # all but the template's tokens
        exact = collator([row])["input_ids"].shape[1]
        template = template or exact - length
        assert exact - length == template
    lengths, epochs = lengths * 20, iter([0, 0, 1])
    sampler = LengthSampler(lengths, 4, 7, lambda: next(epochs))
    first, again, next_epoch = (list(sampler) for _ in range(3))
    assert first == again != next_epoch and sorted(first) == list(range(480))
    batches = [[lengths[i] for i in first[at : at + 4]] for at in range(0, 480, 4)]
    padding = sum(max(batch) - length for batch in batches for length in batch)
    assert padding < 0.1 * 480 / 2 * (
        max(lengths) - min(lengths)
    )  # of what half of the rows could need


def test_a_row_is_as_long_as_a_moving_clip_where_a_processor_drops_still_patches(
    reasoning_rows, tmp_path
) -> None:
    """VideoLLaMA3's, which looks at pixels; times in its prompt have at most two digits more."""
    processor = transformers.VideoLlama3Processor(
        transformers.VideoLlama3ImageProcessor(),
        tokenizer(),
        transformers.VideoLlama3VideoProcessor(),
    )
    noise = np.random.default_rng(0).integers(0, 256, (6, 96, 128, 3), dtype=np.uint8)
    shown = []
    for name, frames in {"moving": noise, "still": np.zeros_like(noise)}.items():
        write_video(tmp_path / f"{name}.mp4", frames, 4.0)
        video = str(tmp_path / f"{name}.mp4")
        row = reasoning_rows[0].model_copy(update={"video": video, "question": "?", "options": ()})
        (length,) = row_lengths([row], processor, 6)
        shown.append(length - 1 - len(VideoInputs(processor, 6).get(video)[LAYOUT]))
    assert 0 <= shown[0] <= 12 < shown[1]


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    for training in ({"max_steps": 0}, {"num_train_epochs": 0}, {"gradient_accumulation_steps": 0}):
        config = TrainConfig(model="m", data="d", output_dir=str(tmp_path), training=training)
        with pytest.raises(ConfigError, match=r"is not from 1 to|no step to take"):
            training_arguments(config)
