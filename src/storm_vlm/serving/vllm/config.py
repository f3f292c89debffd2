# pyright: reportMissingImports=false
"""What a checkpoint with latent slots needs of vLLM: set unless somebody has said otherwise, or refused."""

from __future__ import annotations

import tempfile
from typing import Any

from packaging.version import Version
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vllm import __version__
from vllm.config import CUDAGraphMode
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from storm_vlm.errors import InputError
from storm_vlm.inference.pipeline import DEFAULT_FRAMES
from storm_vlm.model.backbones import BACKBONES
from storm_vlm.model.generation import keep_latent_tokens
from storm_vlm.model.tokens import has_latent_tokens
from storm_vlm.serving.vllm import ARCHITECTURE, OLDEST, TOO_NEW

PROCESSORS = "storm_vlm.serving.vllm.processors"
_folders: list[tempfile.TemporaryDirectory[str]] = []  # as long as this process


def register_configs() -> None:
    """Let vLLM call us with the configuration of every architecture that a checkpoint of ours may have."""
    for model_type in BACKBONES:
        name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, ARCHITECTURE)
        stock = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if not issubclass(stock, LatentConfig):
            MODELS_CONFIG_MAP[name] = type(name, (LatentConfig, stock), {})


class LatentConfig(VerifyAndUpdateConfig):
    """Named after an architecture, in front of what vLLM has for it; called before vLLM starts."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        model = vllm_config.model_config
        super().verify_and_update_config(vllm_config)
        if not has_latent_tokens(model.hf_config):
            return
        if cls.__name__ != ARCHITECTURE:
            raise InputError(
                f"vLLM's {cls.__name__} has no latent slots, only {ARCHITECTURE} has: use storm serve"
            )
        if not Version(OLDEST) <= Version(__version__) < Version(TOO_NEW):
            raise InputError(
                f"latent slots need vLLM {OLDEST} or later and below {TOO_NEW}, not {__version__}: install another"
            )
        check_engine(vllm_config)
        runner = "SegmentOfTensors" if vllm_config.use_v2_model_runner else "SegmentOfLists"
        model.logits_processors = [*(model.logits_processors or ()), f"{PROCESSORS}:{runner}"]
        if model.generation_config == "auto":
            model.override_generation_config.setdefault("temperature", 0.0)  # greedy, as everywhere
        if model.generation_config in ("auto", "vllm"):
            model.generation_config = _generation_config(model)
        video = model.multimodal_config.media_io_kwargs.setdefault("video", {})
        video.setdefault("video_backend", "storm")
        video.setdefault("num_frames", getattr(model.hf_config, "num_frames", 0) or DEFAULT_FRAMES)
        structured = vllm_config.structured_outputs_config
        structured.reasoning_parser = structured.reasoning_parser or "storm"


def check_engine(vllm_config: Any) -> None:
    """Raises InputError for what the rollout cannot be combined with."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    moved = vllm_config.kv_transfer_config is not None  # blocks would leave their states behind
    wrong = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV transfer": moved,
        "microbatches (--enable-dbo)": bool(getattr(parallel, "enable_dbo", False)),
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "CUDA graphs of mode FULL (use FULL_AND_PIECEWISE)": graphs == CUDAGraphMode.FULL,
        "video pruning": bool(model.multimodal_config.video_pruning_rate),
        "a bottleneck": getattr(model.hf_config, "latent_bottleneck", None) is not None,
    }
    if named := [name for name, is_so in wrong.items() if is_so]:
        raise InputError(f"in vLLM latent slots do not go with {', '.join(named)}: leave that out")


def _generation_config(model: Any) -> str:
    """A folder whose generation config says when a turn ends, and nothing else.

    The checkpoint's own lets latent tokens end the turn, for those who have no plugin.
    """
    config = GenerationConfig.from_dict(model.try_get_generation_config())
    keep_latent_tokens(config, model.hf_config)
    _folders.append(tempfile.TemporaryDirectory(prefix="storm-generation-config-"))
    GenerationConfig(eos_token_id=config.eos_token_id).save_pretrained(_folders[-1].name)
    return _folders[-1].name
