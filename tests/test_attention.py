"""Attention over a prompt and what follows it, in two parts: the same numbers, without copies."""

from types import SimpleNamespace

import pytest
import torch
from test_rollout import gradients, relative, training_batch
from tiny_model import BUDGET, left_pad, prompts, tiny_model
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from storm_vlm.model.attention import SDPA_IN_PARTS, PartsLayer, sdpa_in_parts
from storm_vlm.model.latent import answer_loss
from storm_vlm.model.rollout import rollout


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
    for name in ("sdpa", SDPA_IN_PARTS):
        model = with_attention(name)
        loss = answer_loss(rollout(model, batch, BUDGET).logits, batch["labels"])
        found.append((loss.item(), gradients(model, loss)))
    (stock, stock_gradients), (parts, parts_gradients) = found
    assert parts == pytest.approx(stock, rel=1e-7)
    assert relative(parts_gradients, stock_gradients) < 1e-6


def test_the_prompts_keys_are_kept_once() -> None:
    """What autograd keeps of seven slots and a tail over a prompt of 256 tokens; the outputs are equal."""
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 2, 256, 64, requires_grad=True) for _ in range(2))
    steps = [[torch.randn(2, h, n, 64) for h in (16, 2, 2)] for n in (1,) * 7 + (6,)]
    seen = torch.rand(2, 1, 1, 256) < 0.9
    module = SimpleNamespace(num_key_value_groups=8, is_causal=True)
    outputs, kept = [], []
    for attention in (sdpa_attention_forward, sdpa_in_parts):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if attention is sdpa_in_parts:
                layer = PartsLayer(keys, values)
            else:
                layer = DynamicLayer()
                layer.update(keys, values)
            for query, key, value in steps:
                past, new = layer.get_seq_length(), key.shape[2]
                own = torch.ones(new, past - 256 + new, dtype=torch.bool).tril(past - 256)
                mask = torch.cat([seen.expand(-1, -1, new, -1), own.expand(2, 1, -1, -1)], -1)
                found = attention(module, query, *layer.update(key, value), mask)[0]  # type: ignore[arg-type]
                assert layer.get_seq_length() == past + new
                outputs.append(found)
        kept.append(sum(sizes.values()))
    for one, other in zip(outputs[:8], outputs[8:], strict=True):
        torch.testing.assert_close(one, other)
    assert kept[1] < kept[0] / 4


def test_dropout_drops_weights_and_keeps_their_sum_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 1, 8, generator=generator)
    keys = torch.randn(1, 2, 4000, 8, generator=generator) / 10
    ones = torch.ones_like(keys)
    layer = PartsLayer(keys, ones)
    parts = layer.update(keys[:, :, :500], ones[:, :, :500])
    torch.manual_seed(0)
    full, half, none = (
        sdpa_in_parts(torch.nn.Module(), query, *parts, None, dropout=share)[0]
        for share in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(full, torch.ones_like(full))
    torch.testing.assert_close(half, full, atol=0.1, rtol=0)
    assert not torch.allclose(half, full, atol=1e-4) and not none.any()
