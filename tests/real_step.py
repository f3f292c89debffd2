"""What a step really does and keeps; plans are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def grouped(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Of experts: (tokens, from) times (experts, from, to), or a gradient of `weights`."""
    return 2 * prod(rows) * weights[-1]


def attended(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Queries (B, heads, n, size) with keys (B, key heads, T, size)."""
    return 4 * prod(query) * key[-2]


def attended_backward(gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 10 * prod(query) * key[-2]


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
OURS = {torch.ops.aten._grouped_mm: grouped}
if FLASH not in flop_registry:  # torch 2.11 does not count attention on a CPU
    OURS |= {FLASH: attended, FLASH_BACKWARD: attended_backward}


def measure(net: Any, loss_of: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs of forward and backward, and bytes that autograd keeps between the two."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with FlopCounterMode(display=False, custom_mapping=OURS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of()
        size = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        loss.backward()
    return counter.get_total_flops(), size
