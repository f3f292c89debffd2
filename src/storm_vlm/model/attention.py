"""Attention for a few new tokens over a long prompt, without copies of the prompt's keys and values.

transformers' cache appends by concatenation, and autograd keeps every result: with K = 8 slots a rollout would hold
the prompt's keys and values nine times. Where a mask is given, `sdpa` also repeats them for every query head that
shares them: seven times on a 7B model. Here they stay in two parts, the prompt's and the segment's, which every pass
reads where they are; the few queries' scores are all that is kept besides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SDPA_IN_PARTS = "sdpa_in_parts"  # a value of `attn_implementation`


class Parts(NamedTuple):
    """Keys, or values, of the prompt (B, key heads, T, head size) and of what was appended to it (…, n, …)."""

    prompt: Tensor
    appended: Tensor


class PartsLayer(DynamicLayer):
    """A cache layer that hands the prompt's keys and values on as they are. Its reader is `sdpa_in_parts`."""

    keys: Tensor  # of what was appended
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        # As matrix products want them; else each pass would make such a copy of its own.
        self.prompt_keys, self.prompt_values = keys.contiguous(), values.contiguous()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        super().update(key_states, value_states)
        return Parts(self.prompt_keys, self.keys), Parts(self.prompt_values, self.values)

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[-2] + self.keys.shape[-2]


class StatesLayer(LinearAttentionLayer):
    """A cache layer of linear attention whose states keep their graph, and that can go back to the prompt's.

    transformers' own copies every new state over the last one, which backward may still need.
    """

    def __init__(self, conv_states: Tensor, recurrent_states: Tensor) -> None:
        super().__init__()
        self.prompt = conv_states, recurrent_states
        self.conv_kernel_size[0] = conv_states.shape[-1]
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True
        self.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """All that was appended to the prompt goes, whatever its length."""
        conv_states, self.recurrent_states[0] = self.prompt
        self.conv_states[0] = conv_states.clone()  # it is written to

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


def sdpa_in_parts(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`; keys and values in parts are attended to part by part.

    Args:
        query: (B, heads, n, head size).
        key, value: a tensor (B, key heads, T, head size), or `Parts`.
        attention_mask: (B, 1, n, T + n) bool, True where a query may look; None: everywhere.

    Returns:
        (B, n, heads, head size), and no weights.
    """
    if not isinstance(key, Parts):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    batch, heads, length, size = query.shape
    key_heads = key.prompt.shape[1]
    # Query heads that share keys are further queries of one head.
    packed = query.reshape(batch, key_heads, heads // key_heads * length, size)
    packed = packed * (size**-0.5 if scaling is None else scaling)
    scores = torch.cat([packed @ part.mT for part in key], -1)
    if attention_mask is not None:
        hidden = ~attention_mask.repeat(1, 1, heads // key_heads, 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32), dropout).to(query.dtype)
    shares = weights.split([part.shape[-2] for part in value], -1)
    output = shares[0] @ value.prompt + shares[1] @ value.appended
    return output.reshape(batch, heads, length, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA_IN_PARTS, sdpa_in_parts)
AttentionMaskInterface.register(SDPA_IN_PARTS, sdpa_mask)
