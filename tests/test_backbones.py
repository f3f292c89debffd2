"""One conformance suite for all backbones: what storm does with one, it does with each, or refuses by name.

`python tests/test_backbones.py` writes the table of docs/backbones.md. A backbone of your own:
`pytest tests/test_backbones.py --backbone my_package.tiny:save` (see docs/backbones.md).
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from real_step import measure
from tiny_backbones import TINY, save_tiny
from torch import Tensor

from storm_vlm.analysis.states import Batches, extract
from storm_vlm.data.collator import StormCollator
from storm_vlm.data.prompt import build_messages, render_prompt
from storm_vlm.data.row import Row, write_rows
from storm_vlm.data.video import read_video, video_metadata, video_shape
from storm_vlm.errors import StormError
from storm_vlm.evaluation.question_set import evaluate
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.model.attention import SDPA_IN_PARTS
from storm_vlm.model.backbones import BACKBONES, Backbone, backbone
from storm_vlm.model.checkpoint import load_processor
from storm_vlm.model.interventions import answers_when_fed
from storm_vlm.model.latent import answer_loss, pool_targets
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.positions import TrainedPositions
from storm_vlm.model.rollout import RolloutOutput, rollout
from storm_vlm.model.tokens import add_latent_tokens
from storm_vlm.training.config import Method, TrainConfig
from storm_vlm.training.feature_cache import CachedVideoInputs, Excerpt, clip_features
from storm_vlm.training.plan_request import PlanRequest
from storm_vlm.training.planning import plan_config
from storm_vlm.training.targets import alignment_targets
from storm_vlm.training.train import add_adapters, train
from storm_vlm.training.trainer import boundary_loss

DOCS = Path(__file__).parents[1] / "docs/backbones.md"
K, FRAMES = 2, 4
CLOSE: dict[str, float] = {"atol": 1e-4, "rtol": 1e-4}


class Subject:
    """A tiny backbone with latent tokens, and rows that differ in length."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self.folder = folder
        self.stock: Any = StormForConditionalGeneration.from_pretrained(
            str(folder), dtype=torch.float32
        )
        self.processor = load_processor(str(folder))
        add_latent_tokens(self.stock, self.processor, K)
        self.rows = [
            rows[0].model_copy(update={"thought_video": rows[0].thought_video}),
            rows[1].model_copy(update={"question": "Where? " + rows[1].question}),
        ]
        self.adapter: Backbone = backbone(self.stock)

    @property
    def model(self) -> Any:
        """One of its own for each test."""
        return copy.deepcopy(self.stock)

    def collator(self, budget: int = K, videos: Any = None) -> StormCollator:
        return StormCollator(self.processor, FRAMES, budget, videos)

    def batch(self, budget: int = K, rows: Sequence[Row] | None = None) -> dict[str, Tensor]:
        return self.collator(budget)(self.rows if rows is None else rows)

    @cached_property
    def pipeline(self) -> StormPipeline:
        return StormPipeline(self.model, self.processor, FRAMES)


def keeps_a_state(config: Any) -> bool:
    """Whether some layers are of linear attention: they cannot forget a video, and so have no bottleneck."""
    return "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def pytest_options(config: Any) -> dict[str, Any]:
    other = config.getoption("--backbone")
    if other is None:
        return {name: lambda folder, name=name: save_tiny(name, folder) for name in TINY}
    module, _, attribute = other.partition(":")
    return {other: getattr(import_module(module), attribute)}


def pytest_generate_tests(metafunc: Any) -> None:
    if "subject" in metafunc.fixturenames:
        names = pytest_options(metafunc.config)
        metafunc.parametrize("subject", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def subject(request: Any, reasoning_rows: list[Row], tmp_path_factory: Any) -> Subject:
    folder: Path = tmp_path_factory.mktemp("backbone")
    pytest_options(request.config)[request.param](folder)
    return Subject(folder, reasoning_rows)


def recomputed(model: Any, batch: dict[str, Tensor], budget: int) -> RolloutOutput:
    """The rollout without a cache: everything is computed again for each slot, graph and all."""
    hidden = model.get_input_embeddings().weight.shape[1]
    slots = torch.zeros(len(batch["input_ids"]), budget, hidden)
    for k in range(budget):
        states = rollout(model, batch, budget, slot_inputs=slots).states
        slots = torch.cat([slots[:, :k], states[:, k : k + 1], slots[:, k + 1 :]], 1)
    return rollout(model, batch, budget, slot_inputs=slots)


def gradients(model: Any, output: RolloutOutput) -> dict[str, Tensor]:
    model.zero_grad()
    (output.logits.square().mean() + output.states.square().mean()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------- the checks


def test_collator_is_the_stock_processor_to_the_bit(subject: Subject) -> None:
    """Prompts and clips."""
    clips = [read_video(row.video, FRAMES, row.start, row.end) for row in subject.rows]
    texts = [
        render_prompt(subject.processor, build_messages(row.question, row.options), "force")
        for row in subject.rows
    ]
    expected = subject.processor(
        text=texts,
        videos=[clip.frames for clip in clips],
        video_metadata=[video_metadata(clip) for clip in clips],
        do_sample_frames=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    batch = subject.collator().collate_prompts(subject.rows, "force")
    assert batch.keys() == expected.keys() - {"token_type_ids"}
    assert all(torch.equal(tensor, torch.as_tensor(expected[n])) for n, tensor in batch.items())


@torch.no_grad()
def test_no_slots_is_the_stock_model(subject: Subject) -> None:
    """Logits behind prompts of unequal length."""
    model, batch = subject.model, subject.collator(0).collate_prompts(subject.rows, "off")
    expected = model(**batch).logits[:, -1]
    torch.testing.assert_close(rollout(model, batch, 0).logits[:, 0], expected, **CLOSE)


def test_cached_rollout_is_the_recomputed_one_with_its_gradients(subject: Subject) -> None:
    """States, logits and the gradient of every weight; with checkpointing, too."""
    model, batch = subject.model.train(), subject.batch()
    reference = recomputed(model, batch, K)
    expected = gradients(model, reference)
    assert len(expected) > 20 and any(float(g.abs().max()) > 0 for g in expected.values())
    for checkpointed in (False, True):
        if checkpointed:
            enable = "activation_checkpointing_enable"
            enable = enable if hasattr(model, enable) else "gradient_checkpointing_enable"
            getattr(model, enable)({"use_reentrant": False})
        output = rollout(model, batch, K)
        torch.testing.assert_close(output.states, reference.states, **CLOSE)
        torch.testing.assert_close(output.logits, reference.logits, **CLOSE)
        found = gradients(model, output)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-4 + 1e-3 * scale, rtol=1e-3, msg=name
            )


@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(subject: Subject) -> None:
    """Padding changes nothing."""
    model = subject.model
    together = rollout(model, subject.batch(), K)
    for index, row in enumerate(subject.rows):
        alone = rollout(model, subject.batch(rows=[row]), K)
        length = alone.logits.shape[1]
        torch.testing.assert_close(together.states[index], alone.states[0], **CLOSE)
        torch.testing.assert_close(together.logits[index, :length], alone.logits[0], **CLOSE)


@torch.no_grad()
def test_training_computes_what_generate_does(subject: Subject) -> None:
    """The same states in the slots, the same first token."""
    model = subject.model
    batch = subject.collator().collate_prompts(subject.rows, "force")
    written = model.generate(
        **batch,
        max_new_tokens=K + 2,
        do_sample=False,
        output_latent_states=True,
        return_dict_in_generate=True,
        logits_processor=[NeverEnd(model.config.latent_end_token_id)],
    )
    assert written.latent_counts.tolist() == [K, K]
    output = rollout(model, batch, K)
    torch.testing.assert_close(written.latent_states, output.states, **CLOSE)
    allowed = output.logits[:, 0].clone()
    latent = [model.config.latent_start_token_id, model.config.latent_pad_token_id]
    allowed[:, [*latent, model.config.latent_end_token_id]] = -torch.inf
    first = written.sequences[:, batch["input_ids"].shape[1] + K + 1]
    assert torch.equal(first, allowed.argmax(-1))


class NeverEnd:
    """A random model may want to end its segment at once."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.end] = -1e4
        return scores


@torch.no_grad()
def test_every_intervention_continues_the_same_prompt(subject: Subject) -> None:
    """Its cache is taken back to the prompt's end between two of them."""
    model = subject.model
    batch = subject.collator().collate_prompts(subject.rows, "force")
    states = rollout(model, batch, K).states
    slots = {"own": states, "other": states.flip(0), "again": states, "off": None}
    answers = answers_when_fed(model, batch, slots, max_new_tokens=3)
    off = subject.collator(0).collate_prompts(subject.rows, "off")
    latent = [getattr(model.config, f"latent_{name}_token_id") for name in ("start", "pad", "end")]
    expected = rollout(model, off, 0).logits[:, 0].index_fill(1, torch.tensor(latent), -torch.inf)
    torch.testing.assert_close(answers["off"][:, 0], expected, **CLOSE)
    torch.testing.assert_close(answers["own"], answers["again"], **CLOSE)
    torch.testing.assert_close(answers["own"][:, 0], rollout(model, batch, K).logits[:, 0], **CLOSE)


@torch.no_grad()
def test_behind_a_bottleneck_the_answer_knows_the_video_by_the_slots_alone(
    subject: Subject,
) -> None:
    """`method.bottleneck`: the answer's first token in training is that in `generate`."""
    model, batch = subject.model, subject.collator().collate_prompts(subject.rows, "force")
    rows = torch.ones(2, dtype=torch.bool)
    if keeps_a_state(model.config):
        with pytest.raises(StormError, match="linear attention"):
            rollout(model, batch, K, bottleneck=rows)
        return
    narrow, wide = rollout(model, batch, K, bottleneck=rows), rollout(model, batch, K)
    assert float((narrow.logits - wide.logits).abs().max()) > 1e-3
    torch.testing.assert_close(narrow.states, wide.states, **CLOSE)
    model.config.latent_bottleneck = subject.adapter.video_token_id
    fed = answers_when_fed(model, batch, {"own": narrow.states}, max_new_tokens=1)["own"]
    torch.testing.assert_close(fed, narrow.logits, **CLOSE)


@torch.no_grad()
def test_features_kept_on_disk_are_the_towers(subject: Subject, tmp_path: Path) -> None:
    """`vision_cache`; a batch that lacks some is refused."""
    model = subject.model
    expected = rollout(model, subject.batch(), K)
    kept = CachedVideoInputs(model, subject.processor, subject.rows, FRAMES, 0, tmp_path)
    batch = subject.collator(videos=kept)(subject.rows)
    assert "video_features" in batch and subject.adapter.pixels not in batch
    torch.testing.assert_close(rollout(model, batch, K).logits, expected.logits, **CLOSE)
    features = {**batch, "video_features": batch["video_features"][1:]}
    with pytest.raises(StormError, match="video_features"):
        rollout(model, features, K)


def test_a_frozen_tower_is_not_differentiated_and_a_trained_one_is(subject: Subject) -> None:
    """Tower and decoder have all weights between them."""
    model, batch = subject.model, subject.batch()
    adapter = backbone(model)
    assert adapter.video_features(batch).requires_grad
    adapter.vision_tower.requires_grad_(False)
    assert not adapter.video_features(batch).requires_grad
    loss = rollout(model, batch, K).logits.mean()
    loss.backward()
    left = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not left, "neither frozen with the tower nor trained with the decoder"


def test_targets_are_what_the_tower_shows_step_by_step(subject: Subject) -> None:
    """The tower's tokens by temporal grid, K pooled ones a row."""
    model, rows = subject.model, subject.rows
    adapter = backbone(model)
    method = Method(latent_budget=K, target_normalization="none")
    targets = alignment_targets(model, subject.processor, rows, method)
    videos = subject.collator().videos
    for row, target in zip(rows, targets, strict=True):
        assert row.thought_video is not None and target is not None
        features, clip = clip_features(model, videos, Excerpt(row.thought_video.path))
        tokens = adapter.visual_tokens(features, clip)
        assert tokens.shape[0] % K == 0 and tokens.shape[-1] == adapter.hidden_size
        torch.testing.assert_close(target, pool_targets(tokens.flatten(0, 2), K), **CLOSE)
        shown, own = tokens.flatten(0, 2), features[:, : adapter.hidden_size]
        places = torch.cdist(shown, own, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert float(places.values.max()) == 0, "targets hold what is no feature"
        order = list(dict.fromkeys(places.indices.tolist()))  # one that was dropped shows again
        assert order == list(range(len(order))), "targets are not in the order of features"
        assert len(own) - len(order) in (0, 1)  # LLaVA ends a clip by a new line
        steps = tokens.reshape(K, -1, adapter.hidden_size).mean(1)
        torch.testing.assert_close(target, steps, **CLOSE)


def test_save_and_load(subject: Subject, tmp_path: Path) -> None:
    """Weights, latent tokens and answers."""
    model = subject.model
    model.save_pretrained(tmp_path)
    subject.processor.save_pretrained(tmp_path)
    again = StormForConditionalGeneration.from_pretrained(str(tmp_path), dtype=torch.float32)
    batch = subject.collator().collate_prompts(subject.rows, "force")
    options = {"max_new_tokens": K + 3, "do_sample": False}
    assert torch.equal(again.generate(**batch, **options), model.generate(**batch, **options))


def test_pipeline_and_evaluate(subject: Subject) -> None:
    """`storm answer` and `storm evaluate`: a batch as one by one."""
    together = subject.pipeline.answer_batch(subject.rows, max_new_tokens=3)
    alone = [subject.pipeline.answer_batch([row], max_new_tokens=3)[0] for row in subject.rows]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert all(answer.visual_tokens > 0 and answer.slots_used <= K for answer in together)
    shared = subject.rows[1].model_copy(update={"video": subject.rows[0].video})
    pair = [subject.rows[0], shared]  # questions about one clip share what they can
    apart = [subject.pipeline.answer_batch([row], max_new_tokens=3)[0].text for row in pair]
    assert [a.text for a in subject.pipeline.answer_batch(pair, max_new_tokens=3)] == apart
    picture = StormPipeline(subject.model, subject.processor, num_frames=1)
    assert picture.answer_batch(subject.rows, max_new_tokens=3)[0].visual_tokens > 0
    reasoner = Latent(subject.pipeline, max_new_tokens=3)
    records = evaluate(reasoner, subject.rows, reasoner.frames)
    texts = [record.reply.text for record in records if record.reply]
    assert texts == [answer.text for answer in alone]


def test_states_for_validate(subject: Subject) -> None:
    """`storm validate`: states of latents, text, frames and thoughts."""
    states = extract(subject.pipeline, subject.rows, Batches(2))
    assert states.latents.shape == states.targets.shape == (2, K, subject.adapter.hidden_size)
    assert bool(states.has_target.all()) and all(len(t) for t in states.frames)
    inputs = subject.collator().collate_prompts(subject.rows, "force")
    with torch.no_grad():
        expected = rollout(subject.model, inputs, K).states
    torch.testing.assert_close(states.latents, expected, **CLOSE)


def test_a_step_does_and_keeps_what_the_plan_says(subject: Subject) -> None:
    """`storm plan`: FLOPs, weights and what autograd keeps, to 1%."""
    net, row = subject.model.train(), subject.rows[0]
    net.set_attn_implementation({"text_config": SDPA_IN_PARTS})
    base = backbone(net)
    base.vision_tower.requires_grad_(False)
    for kind, budget in (("SFT", 0), ("Stage II", K)):
        batch = subject.batch(budget, [row])
        ids = batch["input_ids"]
        visual = int((ids == base.video_token_id).sum())
        _, height, width = video_shape(row.video)
        request = PlanRequest(
            num_frames=FRAMES,
            height=height,
            width=width,
            question_tokens=ids.shape[1] - visual - bool(budget),
            answer_tokens=batch["labels"].shape[1],
            latent_budget=budget,
            dtype="fp32",
        )
        costs = plan_config(net.config, subject.processor.video_processor, request)
        step = costs.steps[kind]
        flops, kept = measure(net, lambda batch=batch, budget=budget: step_loss(net, batch, budget))
        assert costs.visual_tokens == visual
        assert step.weights == sum(parameter.nbytes for parameter in net.parameters())
        assert step.flops == pytest.approx(flops, rel=0.01)
        assert step.activations + step.logits + step.kv_cache == pytest.approx(kept, rel=0.01)


def step_loss(net: Any, batch: dict[str, Tensor], budget: int) -> Tensor:
    output = rollout(net, batch, budget)
    loss = answer_loss(output.logits, batch["labels"])
    return loss + boundary_loss(net, output) if budget else loss


def test_stage1_and_stage2_with_lora(subject: Subject, tmp_path: Path) -> None:
    """`storm train`: a Stage I step, then a Stage II step of adapters; what was saved loads and answers."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, subject.rows)
    model, losses = subject.folder, []
    for stage, method in {
        "1": Method(latent_budget=K, slot_input="target"),
        "2": Method(latent_budget=K, slot_input="rollout", alignment_weight=0.0),
    }.items():
        config = TrainConfig(
            model=str(model),
            data=str(rows),
            output_dir=str(tmp_path / stage),
            num_frames=FRAMES,
            method=method,
            lora={"r": 2} if stage == "2" else None,
            training={
                "max_steps": 1,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "use_cpu": True,
                "disable_tqdm": True,
                "logging_steps": 1,
                "report_to": "none",
            },
        )
        model = train(config)
        losses.append((model / "log_history.json").read_text())
    assert "alignment_loss" in losses[0] and "slot_gradient/2" in losses[1]
    net = add_adapters(subject.model, {"r": 2})
    adapted = {module for module in net.modules() if isinstance(module, LoraLayer)}
    assert adapted and not adapted & set(backbone(net).vision_tower.modules())
    pipeline = StormPipeline.from_pretrained(str(model), device="cpu")
    assert pipeline.collator.latent_budget == K
    assert len(pipeline.answer_batch(subject.rows, max_new_tokens=2)) == 2


# ------------------------------------------------------------------------- what is not for each one


def test_the_text_behind_a_qwen2_video_begins_behind_it(reasoning_rows, tmp_path) -> None:
    """By the rule that Qwen2-VL was trained with, as Qwen2.5-VL was; transformers' own overlaps."""
    subject = Subject(save_tiny("qwen2_vl", tmp_path), reasoning_rows)
    assert isinstance(subject.adapter.core, TrainedPositions)
    many = StormCollator(subject.processor, 40, K)
    batch = many.collate_prompts([subject.rows[0]], "force")
    grids = int(batch["video_grid_thw"][0, 0])
    positions = subject.adapter.positions(batch)[:, 0]
    of_video = batch["input_ids"][0] == subject.adapter.video_token_id
    first, last = int(of_video.nonzero()[0]), int(of_video.nonzero()[-1])
    start = int(positions[0, first])
    assert positions[0, last] == start + grids - 1
    assert positions[:, last + 1].tolist() == [start + grids] * 3


def test_a_model_type_without_an_adapter_is_one_sentence(
    reasoning_rows, tmp_path, monkeypatch
) -> None:
    folder = save_tiny("internvl", tmp_path / "model")
    monkeypatch.setattr(BACKBONES, "_builtin", {"qwen2_vl": "x:y"})
    monkeypatch.setattr(BACKBONES, "_parts", {})
    BACKBONES.__dict__.pop("_places", None)
    try:
        write_rows(tmp_path / "rows.jsonl", reasoning_rows[:2])
        config = TrainConfig(
            model=str(folder),
            data=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / "out"),
            method=Method(latent_budget=K),
            training={"max_steps": 1, "use_cpu": True},
        )
        with pytest.raises(
            StormError, match=r"storm trains qwen2_vl.*not internvl.*docs/backbones"
        ):
            train(config)
        pipeline = StormPipeline.from_pretrained(str(folder), device="cpu", num_frames=FRAMES)
        assert pipeline.answer_batch(reasoning_rows[:1], max_new_tokens=2)  # needs none
    finally:
        BACKBONES.__dict__.pop("_places", None)


def test_clips_of_unequal_length_are_refused_where_the_model_cannot_take_them(
    reasoning_rows, tmp_path
) -> None:
    subject = Subject(save_tiny("llava_onevision", tmp_path), reasoning_rows)
    short = subject.rows[0].model_copy(update={"end": 0.3})
    with pytest.raises(StormError, match="one length"):
        subject.batch(rows=[short, subject.rows[1]])


# ----------------------------------------------------------------------------------- the docs' table

BEGIN, END = "<!-- table: python tests/test_backbones.py -->", "<!-- end of table -->"


def table() -> str:
    """What the suite checks, and on what: every test that takes a `subject`, in their order."""
    checks = [
        (name.removeprefix("test_").replace("_", " "), function.__doc__ or "")
        for name, function in globals().items()
        if name.startswith("test_") and "subject" in inspect.signature(function).parameters
    ]
    lines = ["| | " + " | ".join(f"`{name}`" for name in TINY) + " |"]
    lines.append("|---|" + "---|" * len(TINY))
    for name, doc in checks:
        refused = {k for k in TINY if "bottleneck" in name and keeps_a_state(TINY[k]()[0])}
        cells = " | ".join("refused" if kind in refused else "yes" for kind in TINY)
        lines.append(f"| **{name}**: {' '.join(doc.split())} | {cells} |")
    return "\n".join(lines)


def test_the_docs_have_the_table_that_this_suite_proves() -> None:
    assert set(TINY) <= set(BACKBONES)
    written = re.search(f"{BEGIN}\n(.*?)\n{END}", DOCS.read_text(), re.DOTALL)
    assert written is not None and written[1] == table(), "python tests/test_backbones.py"


if __name__ == "__main__":
    text = DOCS.read_text()
    DOCS.write_text(re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL))
    sys.exit()
