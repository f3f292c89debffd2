# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""vLLM's Qwen2.5-VL with latent slots: a forward that feeds states back, and the trained rule of positions.

All it needs to know is in vLLM's forward context: whose a token is, and which blocks its sequence has. So it is the
same under both of vLLM's model runners.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models import qwen2_5_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from storm_vlm.model.positions import IMAGE, VIDEO, TrainedPositions
from storm_vlm.model.tokens import LatentError, has_latent_tokens, latent_tokens
from storm_vlm.serving.vllm.feedback import Batch, Feedback


@MULTIMODAL_REGISTRY.register_processor(
    stock.Qwen2_5_VLMultiModalProcessor,
    info=stock.Qwen2_5_VLProcessingInfo,
    dummy_inputs=stock.Qwen2_5_VLDummyInputsBuilder,
)
class StormQwen2_5_VL(stock.Qwen2_5_VLForConditionalGeneration, TrainedPositions):
    """A checkpoint without latent tokens is the stock model."""

    requires_raw_input_tokens = True  # ids beside the embeddings

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.latent = has_latent_tokens(self.config)
        self.feeds = self.latent and not getattr(self.config, "latent_pause", False)
        self.feedback: Feedback | None = None

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        run = super().forward
        batch = self._batch(input_ids) if self.feeds and input_ids is not None else None
        if batch is None:
            return run(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        blocks = self.vllm_config.cache_config.num_gpu_blocks
        if self.feedback is None or self.feedback.blocks != blocks:
            # vLLM tries the model with few blocks before it knows how many there is room for.
            self.feedback = Feedback(latent_tokens(self.config).pad, blocks, embeds)
        return self.feedback.forward(
            batch, embeds, lambda changed: run(None, positions, None, changed, **kwargs)
        )

    def _batch(self, input_ids: Tensor) -> Batch | None:
        """Of this forward; None where vLLM only tries the model out, without attention."""
        context = get_forward_context() if is_forward_context_available() else None
        if context is None or not context.attn_metadata:
            return None
        metadata: Any = next(iter(dict(context.attn_metadata).values()))
        try:
            return Batch(
                input_ids[: metadata.num_actual_tokens],
                metadata.query_start_loc,
                metadata.seq_lens[: len(metadata.query_start_loc) - 1],
                metadata.block_table,
                self.vllm_config.cache_config.block_size,
            )
        except AttributeError as error:
            raise LatentError(
                f"latent slots need attention metadata with block tables, and {type(metadata).__name__} has none: "
                "start vLLM with --attention-backend FLASH_ATTN"
            ) from error

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Positions (3, T) and their distance from the number of tokens, as in training."""
        if not self.latent:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        ids = torch.tensor([input_tokens])
        kinds, seconds = torch.zeros_like(ids), []
        grids: dict[str, list[Tensor]] = {"image": [], "video": []}
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            name, place, data = feature.modality, feature.mm_position, feature.data
            kinds[0, place.offset :][: place.length] = VIDEO if name == "video" else IMAGE
            grids[name].append(data[f"{name}_grid_thw"].data)
            if name == "video":
                seconds.append(float(data["second_per_grid_ts"].data))
        images, videos = (torch.stack(found) if found else None for found in grids.values())
        positions, delta = self.get_rope_index(ids, kinds, images, videos, seconds)
        return positions[:, 0], int(delta)
