"""Attention that packs query heads: the same numbers, without copies of the cache."""

from types import SimpleNamespace

import pytest
import torch
from test_rollout import gradients, relative, training_batch
from tiny_model import BUDGET, left_pad, prompts, tiny_model
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from storm_vlm.attention import PACKED_SDPA, packed_sdpa
from storm_vlm.latent import answer_loss
from storm_vlm.rollout import rollout


def with_attention(name: str, dtype: torch.dtype = torch.float64):
    model = tiny_model().to(dtype)
    model.set_attn_implementation({"text_config": name})
    return model


def batch_of(padded: bool) -> dict[str, Tensor]:
    batch = training_batch()
    if not padded:
        one = left_pad(prompts()[:1])
        batch = {**one, "labels": batch["labels"][:1]}
    return batch


@pytest.mark.parametrize("padded", [True, False])
def test_losses_and_gradients_are_those_of_stock_attention(padded: bool) -> None:
    batch = batch_of(padded)
    found = []
    for name in ("sdpa", PACKED_SDPA):
        model = with_attention(name)
        loss = answer_loss(rollout(model, batch, BUDGET).logits, batch["labels"])
        found.append((loss.item(), gradients(model, loss)))
    (stock, stock_gradients), (packed, packed_gradients) = found
    assert packed == pytest.approx(stock, rel=1e-7)
    assert relative(packed_gradients, stock_gradients) < 1e-6


def test_the_cache_is_not_copied_for_the_backward_pass() -> None:
    """What autograd keeps of six queries over 256 keys that eight heads share, twice; the answers are equal."""
    torch.manual_seed(0)
    query = torch.randn(2, 16, 6, 64, requires_grad=True)
    key, value = (torch.randn(2, 2, 256, 64, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 6, 256) < 0.9
    module = SimpleNamespace(num_key_value_groups=8, is_causal=True)
    outputs, kept = [], []
    for attention in (sdpa_attention_forward, packed_sdpa):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs.append(attention(module, query, key, value, mask)[0])  # type: ignore[arg-type]
        kept.append(sum(sizes.values()))
    torch.testing.assert_close(*outputs)
    assert kept[1] < kept[0] / 2
