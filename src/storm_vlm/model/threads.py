"""A small model runs on one thread, whatever the machine has."""

from __future__ import annotations

from typing import Any

import torch

SMALL = 20_000_000  # parameters; the micro models have about a million


def one_thread_if_small(model: Any) -> None:
    """Set PyTorch to one thread for this process if the model is small; a larger one keeps the user's threads.

    Threads wait for each other after every operation. A small model's operations take less than the wait: on cores
    that other programs use, too, two threads were 10 to 400 times slower than one.
    """
    if sum(parameter.numel() for parameter in model.parameters()) <= SMALL:
        torch.set_num_threads(1)
