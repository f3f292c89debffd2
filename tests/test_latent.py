import pytest
import torch

from storm_vlm.model.latent import (
    alignment_loss,
    answer_loss,
    pool_targets,
    storm_loss,
    target_whitening,
    whiten_targets,
)


@pytest.mark.parametrize(("tokens", "slots"), [(12, 4), (10, 4), (3, 8), (1, 4), (7, 7)])
def test_each_target_is_the_mean_of_its_adaptive_segment(tokens: int, slots: int) -> None:
    x = torch.randn(tokens, 5)
    segments = [
        x[k * tokens // slots : -(-(k + 1) * tokens // slots)].mean(0) for k in range(slots)
    ]
    torch.testing.assert_close(pool_targets(x, slots), torch.stack(segments))


def test_pooling_is_float32() -> None:
    assert pool_targets(torch.ones(6, 2, dtype=torch.bfloat16), 3).dtype == torch.float32


def test_whitened_targets_vary_equally_in_every_direction_and_have_length_1() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator) @ torch.diag(torch.tensor([1.0, 10.0, 100.0]))
    targets = torch.randn(5000, 4, 3, generator=generator) @ mixing + 7
    mean, matrix = target_whitening(targets, ridge=0)
    flat = ((targets - mean) @ matrix).flatten(0, 1)
    torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(3), atol=2e-3, rtol=0)
    rows = whiten_targets(targets, mean, matrix)
    torch.testing.assert_close(rows.square().mean(-1), torch.ones(5000, 4))
    cosine = torch.nn.functional.cosine_similarity(rows.flatten(0, 1), flat, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(20000))


def test_ridge_keeps_noise_small_and_constant_targets_finite() -> None:
    targets = torch.randn(1000, 2) * torch.tensor([1.0, 1e-4])
    mean, matrix = target_whitening(targets)
    first, second = ((targets - mean) @ matrix).std(0)
    assert first > 0.9 and second < 0.01
    same = torch.ones(5, 4, 3)
    assert whiten_targets(same, *target_whitening(same)).isfinite().all()


def test_alignment_loss_is_the_mean_over_valid_rows_only() -> None:
    states = torch.randn(3, 4, 5, requires_grad=True)
    targets = torch.randn(3, 4, 5)
    targets[1] = float("nan")  # whatever an absent thought video left behind
    loss = alignment_loss(states, targets, torch.tensor([True, False, True]))
    torch.testing.assert_close(loss, (states - targets)[[0, 2]].square().mean())
    distance = alignment_loss(states, targets, torch.tensor([True, False, True]), "sum")
    torch.testing.assert_close(distance, 5 * loss)
    loss.backward()
    assert states.grad is not None and states.grad.isfinite().all()
    assert states.grad[1].abs().sum() == 0 and states.grad[0].abs().sum() > 0


def test_alignment_loss_without_any_target_is_zero_and_has_a_graph() -> None:
    states = torch.randn(2, 4, 5, requires_grad=True)
    loss = alignment_loss(states, torch.full((2, 4, 5), float("nan")), torch.zeros(2).bool())
    loss.backward()
    assert loss.item() == 0 and states.grad is not None and states.grad.abs().sum() == 0


def test_alignment_targets_are_detached_and_compared_in_float32() -> None:
    targets = torch.randn(1, 2, 3, requires_grad=True)
    states = torch.randn(1, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = alignment_loss(states, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and targets.grad is None


def test_answer_loss_is_the_mean_over_answer_tokens() -> None:
    logits = torch.randn(2, 3, 7)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    chosen = [logits.log_softmax(-1)[row, i, labels[row, i]] for row, i in [(0, 0), (0, 1), (1, 0)]]
    torch.testing.assert_close(answer_loss(logits, labels), -torch.stack(chosen).mean())
    assert answer_loss(logits, torch.full_like(labels, -100)).item() == 0


def test_storm_loss() -> None:
    assert storm_loss(torch.tensor(2.0), torch.tensor(3.0), 0.1).item() == pytest.approx(2.3)
