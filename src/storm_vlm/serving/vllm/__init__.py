# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Latent slots in an unmodified vLLM: this package is a plugin, which vLLM loads by its entry point.

What there is to it, in reading order:

* `feedback` — the method: a slot's input is the last hidden state. Plain torch.
* `model` — vLLM's Qwen2.5-VL with that around its ``forward``, and our rule of positions.
* `rule` — which token may follow, and what a request may ask for; `processors` hands it to vLLM's samplers.
* `video` — clips by our reader; `usage` — slots in the usage; `config` — what is set and refused at the start.

A checkpoint without latent tokens is vLLM's own model.
"""

from __future__ import annotations

OLDEST, TOO_NEW = "0.31", "0.34"  # 0.30 hands no timestamps on: every clip would count as 24 fps
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


def register() -> None:
    """Entry point `vllm.general_plugins`: called in each of vLLM's processes."""
    from vllm import ModelRegistry
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
    from vllm.reasoning import ReasoningParserManager

    from storm_vlm.serving.vllm.config import register_configs
    from storm_vlm.serving.vllm.video import StormVideoLoader

    register_configs()
    VIDEO_LOADER_REGISTRY.register("storm")(StormVideoLoader)
    ReasoningParserManager.register_lazy_module("storm", f"{__name__}.usage", "SlotCount")
    # by name: its module initialises devices
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:StormQwen2_5_VL")
