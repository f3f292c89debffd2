"""Where the time of one ``generate`` goes: measured by hooks, with the device waited for."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from storm_vlm.model.backbones import input_device


class Phases:
    """Around one call of ``model.generate``; then `split` tells its phases apart.

    The last forwards, one a new token, read the end of the prompt and then a token a row; others before them read
    what prompts have in common.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = input_device(model)
        self.vision = 0.0
        self.forwards: list[float] = []  # when each was over

    def __enter__(self) -> Self:
        tower = self.model.get_encoder("video")
        self._hooks = [self.model.register_forward_hook(self._forward_over)]
        if tower not in (self.model, self.model.base_model):
            self._hooks.append(tower.register_forward_pre_hook(self._vision_begins))
            self._hooks.append(tower.register_forward_hook(self._vision_over))
        self.began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = self._now()
        for hook in self._hooks:
            hook.remove()

    def split(self, new_ids: Tensor) -> dict[str, float]:
        """Seconds of `vision`, `prefill`, `latent` and `answer`, which add up to the call's.

        `latent`: the steps that fed a slot, in any row of `new_ids` (B, T), the ids behind the
        prompt. `answer`: all that was written.
        """
        pad = getattr(self.model.config, "latent_pad_token_id", None)
        fed = (new_ids == -1 if pad is None else new_ids == pad).any(0).tolist()
        read = len(self.forwards) - new_ids.shape[1]  # the forward that ends the prompts
        spans = [after - before for before, after in pairwise(self.forwards[read:])]
        latent = sum(span for span, is_slot in zip(spans, fed, strict=False) if is_slot)
        return {
            "vision": self.vision,
            "prefill": self.forwards[read] - self.began - self.vision,
            "latent": latent,
            "answer": self.ended - self.forwards[read] - latent,
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _forward_over(self, *_: Any) -> None:
        self.forwards.append(self._now())

    def _vision_begins(self, *_: Any) -> None:
        self.vision -= self._now()

    def _vision_over(self, *_: Any) -> None:
        self.vision += self._now()
