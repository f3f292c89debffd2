"""Where a model runs."""

from __future__ import annotations

import torch

from storm_vlm.errors import InputError


def torch_device(name: str | None = None) -> torch.device:
    """The device of that name; by default a GPU if there is one. Raises InputError: there is no such device here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"no device {name!r} here ({str(error).splitlines()[0]}): choose cpu, or another machine"
        ) from error
    if device.type == "meta":
        raise InputError("the device 'meta' holds no numbers: choose cpu or cuda")
    return device
