# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""What a checkpoint with latent slots needs of vLLM: set unless somebody has said otherwise, or refused."""

from __future__ import annotations

from tempfile import TemporaryDirectory
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

_folders: list[TemporaryDirectory[str]] = []  # as long as this process


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
        super().verify_and_update_config(vllm_config)
        model = vllm_config.model_config
        if not has_latent_tokens(model.hf_config):
            return
        _check(vllm_config, cls.__name__)
        runner = "SegmentOfTensors" if vllm_config.use_v2_model_runner else "SegmentOfLists"
        rule = f"storm_vlm.serving.vllm.processors:{runner}"
        model.logits_processors = [*(model.logits_processors or ()), rule]
        if model.generation_config == "auto":
            model.override_generation_config.setdefault("temperature", 0.0)  # greedy, as everywhere
        if model.generation_config in ("auto", "vllm"):
            model.generation_config = _ends_of_a_turn(model)
        video = model.multimodal_config.media_io_kwargs.setdefault("video", {})
        video.setdefault("video_backend", "storm")
        video.setdefault("num_frames", getattr(model.hf_config, "num_frames", 0) or DEFAULT_FRAMES)
        structured = vllm_config.structured_outputs_config
        structured.reasoning_parser = structured.reasoning_parser or "storm"


def _check(vllm_config: Any, architecture: str) -> None:
    """Raises InputError for what latent slots cannot be combined with."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    version = f"vLLM {__version__} (it must be {OLDEST} or later and below {TOO_NEW})"
    graphs = vllm_config.compilation_config.cudagraph_mode
    moved = vllm_config.kv_transfer_config is not None  # blocks would leave their states behind
    wrong = {
        version: not Version(OLDEST) <= Version(__version__) < Version(TOO_NEW),
        f"vLLM's {architecture} (it must be {ARCHITECTURE})": architecture != ARCHITECTURE,
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
        raise InputError(
            f"latent slots do not go with {', '.join(named)}: change that, or use storm serve"
        )


def _ends_of_a_turn(model: Any) -> str:
    """A folder whose generation config says which tokens end a turn, and nothing else.

    The checkpoint's own lets latent tokens end the turn, for those who have no plugin.
    """
    config = GenerationConfig(eos_token_id=model.try_get_generation_config().get("eos_token_id"))
    keep_latent_tokens(config, model.hf_config)
    _folders.append(TemporaryDirectory(prefix="storm-generation-config-"))
    config.save_pretrained(_folders[-1].name)
    return _folders[-1].name
