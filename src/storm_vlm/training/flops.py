"""What is computed, counted while it runs: torch's formulas, and those that some version of it lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """Within it, the FLOPs of products, and the bytes of the tensors that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.read = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = FLOPS.get(func.overloadpacket)
        if count is None and torch.is_inference_mode_enabled():  # which hands on whole layers
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = self.compute(func, types, args, kwargs)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=output)
            self.read += sum(arg.nbytes for arg in args if isinstance(arg, Tensor))
        return output

    def compute(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """FLOPs of the experts' grouped products: each row meets one expert, or each expert its rows."""
    return 2 * a.numel() * b.shape[-1]


def _attended(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """FLOPs of two products, each of every query with every key. torch 2.11 has no count of its own on a CPU."""
    return 4 * query.numel() * key.shape[-2]


def _attended_backward(gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Five products: the scores once more, and one for each gradient of the forward's two."""
    return 10 * query.numel() * key.shape[-2]


FLOPS = {
    **flop_registry,
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attended,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attended_backward,
}
