# pyright: reportMissingImports=false
"""The rule of `storm_vlm.serving.vllm.rule` as vLLM's logits processors, one for each of its model runners.

`SegmentOfLists` is for the first, which has what was written on the host, `SegmentOfTensors` for the second, which
has it on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as ListsInterface
from vllm.v1.sample.logits_processor import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as TensorsInterface

from storm_vlm.serving.vllm.rule import NOTHING, Request, Segment, check_params


class SegmentOfLists(ListsInterface):
    """For model runner V1."""

    validate_params = staticmethod(check_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.segment, self.device = Segment(vllm_config), device
        self.rows: dict[int, tuple[Request, list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        def row(params: Any, prompt: list[int] | None, output: list[int]) -> Any:
            return self.segment.request(params), (prompt or [NOTHING])[-1:], output  # which grows

        process_dict_updates(self.rows, batch_update, row)

    def apply(self, logits: Tensor) -> Tensor:
        requests, lasts, outputs = zip(*(self.rows[i] for i in range(len(logits))), strict=True)

        def ids_of(rows: list[int], width: int) -> Tensor:
            texts = [lasts[row] + outputs[row] for row in rows]
            padded = [[NOTHING] * (width - len(text)) + text for text in texts]
            return torch.tensor(padded, device=self.device)

        return self.segment.apply(logits, requests, [len(output) for output in outputs], ids_of)


class SegmentOfTensors(TensorsInterface):
    """For model runner V2. Reads nothing back from the device."""

    validate_params = staticmethod(check_params)

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.segment, self.states = Segment(vllm_config), req_states
        self.rows: dict[int, Request] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.rows[req_idx] = self.segment.request(sampling_params)
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        def ids_of(rows: list[int], width: int) -> Tensor:
            at = torch.tensor(rows).to(logits.device, non_blocking=True)
            slots = ctx.idx_mapping[at].long()[:, None]
            back = torch.arange(1 - width, 1, device=logits.device)
            place = ctx.pos[at].long()[:, None] + back
            ids = self.states.all_token_ids.gpu[slots, place.clamp_min(0)]
            return ids.where(place >= self.states.prompt_len.gpu[slots] - 1, NOTHING)

        slots = ctx.idx_mapping_np
        written = ctx.seq_lens_upper_bound_np - self.states.prompt_len.np[slots]
        requests = [self.rows[int(slot)] for slot in slots]
        return self.segment.apply(logits, requests, written.clip(0).tolist(), ids_of)
