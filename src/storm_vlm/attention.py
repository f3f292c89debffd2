"""Attention for a few new tokens over a long cache, without copies of that cache.

Where a mask is given, transformers' `sdpa` repeats keys and values for every query head that shares them, and
autograd keeps the copies: on a 7B model, 28 query heads over 4 of keys, seven times the cache of a 4,000-token prompt
for the one short pass that ends a rollout. Query heads that share keys can as well be further queries of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_SDPA = "sdpa_packed"  # a value of `attn_implementation`
SHORT = (
    64  # queries: beyond, their share of the memory is what matters, and stock kernels are faster
)


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, but few queries (B, heads, q, head size) are packed to (B, key heads, groups * q, …)."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    few = length <= SHORT and length < key.shape[2]
    if not few or groups == 1 or attention_mask is None or attention_mask.shape[1] > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    packed = query.reshape(batch, key.shape[1], groups * length, size)
    mask = attention_mask.repeat(1, 1, groups, 1)  # (B, 1, groups * q, cached + q)
    output = F.scaled_dot_product_attention(packed, key, value, mask, dropout, scale=scaling)
    return output.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
