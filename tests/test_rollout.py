from typing import Any

import pytest
import torch
from tiny_model import (
    BUDGET,
    TOKENS,
    labels_for,
    left_pad,
    prompts,
    recompute,
    tiny_model,
    tiny_stock_model,
)
from torch import Tensor

from storm_vlm.model.latent import alignment_loss, answer_loss
from storm_vlm.model.rollout import RolloutOutput, rollout

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def exact_model(**changes: Any) -> Any:
    """In float64 a difference is a mistake, not the order of a sum (norms stay float32 inside)."""
    return tiny_model(**changes).double()


def training_batch(force: bool = True) -> dict[str, Tensor]:
    rows = prompts(force)
    return {**left_pad(rows), "labels": labels_for(len(rows))}


def naive(
    model: Any,
    row: dict[str, Tensor],
    labels: Tensor,
    budget: int,
    given: Tensor | None = None,
    pick: Tensor | None = None,
) -> RolloutOutput:
    """One row, all recomputed for every slot. ``given`` (K, D) is fed where ``pick`` (K,)."""
    length, states, slots = row["input_ids"].shape[1], [], {}
    for k in range(budget):
        hidden = recompute(model, row, [TOKENS.pad] * k, slots)
        states.append(hidden[-1])
        slots[k] = given[k] if given is not None and (pick is None or pick[k]) else hidden[-1]
    answer = labels[labels != -100].tolist()
    hidden = recompute(model, row, [TOKENS.pad] * budget + [TOKENS.end] + answer[:-1], slots)
    logits = model.lm_head(hidden)
    return RolloutOutput(
        logits[length + budget :],
        torch.stack(states),
        logits[length - 2],
        logits[length + budget - 1],
    )


def assert_same(output: RolloutOutput, row: int, want: RolloutOutput) -> None:
    assert output.start_logits is not None and output.end_logits is not None
    torch.testing.assert_close(output.logits[row, : len(want.logits)], want.logits, **CLOSE)
    torch.testing.assert_close(output.states[row], want.states, **CLOSE)
    torch.testing.assert_close(output.start_logits[row], want.start_logits, **CLOSE)
    torch.testing.assert_close(output.end_logits[row], want.end_logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 4, 8, 16])
def test_cached_batch_equals_each_row_recomputed(budget: int) -> None:
    model, batch = exact_model(), training_batch()
    output = rollout(model, batch, budget)
    assert output.states.shape[1] == budget
    for i, row in enumerate(prompts()):
        assert_same(output, i, naive(model, row, batch["labels"][i], budget))


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_the_batch() -> None:
    model, batch = exact_model(), training_batch()
    output = rollout(model, batch, BUDGET)
    for i, row in enumerate(prompts()):
        alone = rollout(model, {**row, "labels": batch["labels"][i : i + 1]}, BUDGET)
        answer = batch["labels"][i] != -100
        torch.testing.assert_close(output.logits[i, answer], alone.logits[0, answer], **CLOSE)
        torch.testing.assert_close(output.states[i], alone.states[0], **CLOSE)


@torch.no_grad()
def test_given_slot_inputs_are_fed_where_asked() -> None:
    model, batch = exact_model(), training_batch()
    given = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    pick = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    teacher_forced = rollout(model, batch, BUDGET, given)
    per_slot = rollout(model, batch, BUDGET, given, pick)
    per_row = rollout(model, batch, BUDGET, given, torch.tensor([True, True, False]))
    for i, row in enumerate(prompts()):
        labels = batch["labels"][i]
        forced = naive(model, row, labels, BUDGET, given[i])
        assert_same(teacher_forced, i, forced)
        assert_same(per_slot, i, naive(model, row, labels, BUDGET, given[i], pick[i]))
        assert_same(per_row, i, naive(model, row, labels, BUDGET) if i == 2 else forced)
    # credit belongs to the model's own states, also where another was fed
    for output in (per_slot, per_row):
        assert torch.equal(torch.cat(output.fed, 1), output.states)
    assert teacher_forced.fed == rollout(model, batch, BUDGET, detach_feedback=True).fed == ()


def test_credit_arrives_at_own_states_only_where_they_were_fed() -> None:
    model, batch = exact_model(), training_batch()
    given = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    pick = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    output = rollout(model, batch, BUDGET, given, pick)
    for state in output.fed:
        state.retain_grad()
    answer_loss(output.logits, batch["labels"]).backward()
    credit = torch.cat([state.grad for state in output.fed], 1)
    assert torch.equal(credit.abs().sum(-1) > 0, ~pick)


@torch.no_grad()
def test_without_slots_it_is_the_stock_forward_bit_for_bit() -> None:
    stock, model, batch = tiny_stock_model(), tiny_model(), training_batch(force=False)
    labels, length = batch.pop("labels"), batch["input_ids"].shape[1]
    output = rollout(model, {**batch, "labels": labels}, 0)
    positions, _ = model.model.get_rope_index(
        **{n: v for n, v in batch.items() if n != "pixel_values_videos"}
    )
    added = labels.shape[1] - 1
    full = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], labels[:, :-1].clamp_min(0)], 1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, added), value=1),
        "mm_token_type_ids": torch.nn.functional.pad(batch["mm_token_type_ids"], (0, added)),
        "position_ids": torch.cat(
            [positions, positions[..., -1:] + torch.arange(1, added + 1)], -1
        ),
    }
    expected = stock(**full, logits_to_keep=labels.shape[1]).logits
    assert torch.equal(output.logits, expected) and expected.shape[1] == labels.shape[1]
    assert torch.equal(model(**{**full, "position_ids": None}).logits[:, length - 1 :], expected)
    assert output.states.shape == (3, 0, 64)
    assert output.start_logits is None and output.end_logits is None


def gradients(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_gradients_equal_those_of_recomputing_everything() -> None:
    model, batch = tiny_model().double(), training_batch()
    labels = batch["labels"]
    targets = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0))

    def loss_of(output: RolloutOutput) -> Tensor:
        return answer_loss(output.logits, labels) + alignment_loss(output.states, targets)

    def naive_batch(given: Tensor | None = None) -> RolloutOutput:
        rows = [
            naive(model, row, labels[i], BUDGET, None if given is None else given[i])
            for i, row in enumerate(prompts())
        ]
        pad = torch.nn.functional.pad
        logits = [pad(r.logits, (0, 0, 0, labels.shape[1] - len(r.logits))) for r in rows]
        states = torch.stack([r.states for r in rows])
        return RolloutOutput(torch.stack(logits), states, None, None)

    cached = gradients(model, loss_of(rollout(model, batch, BUDGET)))
    expected = gradients(model, loss_of(naive_batch()))
    assert relative(cached, expected) < 1e-6
    forced = gradients(model, loss_of(rollout(model, batch, BUDGET, targets)))
    assert relative(forced, gradients(model, loss_of(naive_batch(targets.double())))) < 1e-6
    # and the comparison can tell: without credit through the fed-back states they differ a lot
    cut = gradients(model, loss_of(rollout(model, batch, BUDGET, detach_feedback=True)))
    assert relative(cut, expected) > 0.05


def test_in_float64_throughout_the_gradients_are_equal_to_the_last_digits() -> None:
    """Qwen's RMSNorm and its vision tower's rotary embedding compute in float32: the one is replaced, the other
    frozen, and what is left of the difference is the order of sums. Left-padded rows, checkpointed or not."""
    model, batch = exact_model(), training_batch()
    model.model.visual.requires_grad_(False)
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    labels = batch["labels"]
    losses = [
        answer_loss(naive(model, row, labels[i], BUDGET).logits[None], labels[i : i + 1, :n])
        for i, (row, n) in enumerate(zip(prompts(), (labels != -100).sum(1).tolist(), strict=True))
    ]
    counts = (labels != -100).sum(1)
    expected = gradient(
        sum(n * loss for n, loss in zip(counts, losses, strict=True)) / counts.sum()
    )
    plain = gradient(answer_loss(rollout(model, batch, BUDGET).logits, labels))
    assert relative(plain, expected) < 1e-12
    checkpoint(model.train(), use_reentrant=False)
    assert (
        relative(gradient(answer_loss(rollout(model, batch, BUDGET).logits, labels)), plain) < 1e-12
    )


@torch.no_grad()
def test_without_labels_the_first_answer_token_is_scored() -> None:
    model, batch = exact_model(), training_batch()
    full = rollout(model, batch, BUDGET).logits
    del batch["labels"]
    first = rollout(model, batch, BUDGET).logits
    assert first.shape[1] == 1
    torch.testing.assert_close(first, full[:, :1], **CLOSE)


def checkpoint(model: Any, **kwargs: Any) -> Any:
    if hasattr(model, "activation_checkpointing_enable"):  # its name from 5.23 on
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)
    return model.train()


@pytest.mark.parametrize("fed", ["own states", "targets", "both"])
def test_checkpointing_changes_neither_loss_nor_gradients(fed: str) -> None:
    batch = training_batch()
    given = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    pick = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    arguments = {"own states": (), "targets": (given,), "both": (given, pick)}[fed]
    plain, checkpointed = exact_model().train(), checkpoint(exact_model(), use_reentrant=False)
    runs = [0, 0]
    for i, model in enumerate((plain, checkpointed)):
        for layer in model.model.language_model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda *_, i=i: runs.__setitem__(i, runs[i] + 1)
            )
    found = []
    for model in (plain, checkpointed):
        output = rollout(model, batch, BUDGET, *arguments)
        loss = answer_loss(output.logits, batch["labels"]) + alignment_loss(output.states, given)
        found.append((loss, gradients(model, loss)))
    assert runs[1] == runs[0] + 3  # the three layers' long pass ran again in backward, and no other
    (loss, expected), (same_loss, same) = found
    assert abs(loss - same_loss) < 1e-9 and relative(same, expected) < 1e-9
    assert checkpointed.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.language_model.layers)


def test_checkpointing_that_cuts_the_gradient_is_refused() -> None:
    model = checkpoint(tiny_model(), use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        rollout(model, training_batch(), BUDGET)


@torch.no_grad()
def test_peft_wrapped_model_rolls_out_with_its_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    batch = training_batch()
    plain = rollout(tiny_model(), batch, BUDGET)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    wrapped = get_peft_model(tiny_model(), config).eval()
    adapted = rollout(wrapped, batch, BUDGET)
    assert (adapted.logits - plain.logits).abs().max() > 0.1
    merged = rollout(wrapped.merge_and_unload(), batch, BUDGET)
    torch.testing.assert_close(adapted.logits, merged.logits, atol=1e-3, rtol=0)


@torch.no_grad()
def test_video_features_stand_for_the_tower() -> None:
    model, batch = exact_model(), training_batch()
    expected = rollout(model, batch, BUDGET)
    video = batch.pop("pixel_values_videos").double(), batch["video_grid_thw"]
    features = torch.cat(model.model.get_video_features(*video).pooler_output)
    assert torch.equal(
        rollout(model, {**batch, "video_features": features}, BUDGET).logits, expected.logits
    )
    for wrong in (features[1:], torch.cat([features, features[:1]])):
        with pytest.raises(ValueError, match=f"{len(wrong)} video_features for {len(features)}"):
            rollout(model, {**batch, "video_features": wrong}, BUDGET)


def test_mistakes_are_named() -> None:
    model, batch = exact_model(), training_batch()
    with pytest.raises(ValueError, match="latent_start"):
        rollout(model, training_batch(force=False), BUDGET)
    with pytest.raises(ValueError, match="slot_inputs"):
        rollout(model, batch, BUDGET, torch.zeros(3, BUDGET + 1, 64))
    with pytest.raises(ValueError, match="slot_inputs"):
        rollout(model, batch, BUDGET, torch.zeros(3, 1, 64), torch.ones(3).bool())
    last = torch.ones_like(batch["attention_mask"])
    last[0, -1] = 0
    for mask in (batch["attention_mask"].flip(1), last):
        with pytest.raises(ValueError, match="left"):
            rollout(model, {**batch, "attention_mask": mask}, BUDGET)


@torch.no_grad()
@pytest.mark.parametrize("fed", ["own", "given", "mixed", "bottleneck"])
def test_a_row_of_fewer_slots_is_as_if_the_budget_were_its_own(fed: str) -> None:
    model, batch = exact_model(), training_batch()
    slots, whole = torch.tensor([2, BUDGET, 1]), torch.full((3,), BUDGET)
    given = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    pick = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()

    def rolled_out(budget: int, **more: Tensor) -> RolloutOutput:
        inputs = None if fed == "own" else given[:, :budget]
        use_target = pick[:, :budget] if fed == "mixed" else None
        hidden = torch.tensor([True, False, True]) if fed == "bottleneck" else None
        return rollout(model, {**batch, **more}, budget, inputs, use_target, bottleneck=hidden)

    output = rolled_out(BUDGET, slots=slots)
    assert output.has_slot.sum(1).tolist() == slots.tolist()
    assert output.end_logits is not None
    for i, count in enumerate(slots.tolist()):
        want, answer = rolled_out(count), batch["labels"][i] != -100
        assert want.end_logits is not None
        torch.testing.assert_close(output.logits[i, answer], want.logits[i, answer], **CLOSE)
        torch.testing.assert_close(output.states[i, :count], want.states[i], **CLOSE)
        torch.testing.assert_close(output.end_logits[i], want.end_logits[i], **CLOSE)
    of_all = rolled_out(BUDGET, slots=whole)
    torch.testing.assert_close(of_all.logits, rolled_out(BUDGET).logits, **CLOSE)


def test_no_gradient_comes_from_slots_that_a_row_has_not() -> None:
    model, batch = exact_model(), training_batch()
    slots = torch.tensor([2, BUDGET, 1])
    output = rollout(model, {**batch, "slots": slots}, BUDGET)
    for state in output.fed:
        state.retain_grad()
    answer_loss(output.logits, batch["labels"]).backward()
    credit = torch.cat([state.grad for state in output.fed], 1)
    assert torch.equal(credit.abs().sum(-1) > 0, output.has_slot)
