"""A tiny random model of every backbone that has an adapter, with its real processor class and a byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from storm_vlm.lab.world.backbone import CHAT_TEMPLATE, SPECIAL

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MERGED: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
SQUARE = {"height": 28, "width": 28}


def tokenizer(*special: str, **named: str) -> Any:
    """256 bytes, then the special tokens; `named` ones are its attributes, too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = [*SPECIAL, *special, *named.values()]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=named,
    )


def text_config(words: Any, **more: Any) -> dict[str, Any]:
    ends = {"bos_token_id": words.pad_token_id, "pad_token_id": words.pad_token_id}
    return {
        **TEXT,
        "vocab_size": len(words) + 8,
        **ends,
        "eos_token_id": words.eos_token_id,
        **more,
    }


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": list(section), "rope_theta": 1e4, **more}
    return {"rope_parameters": rope}


def token_ids(words: Any, **names: str) -> dict[str, int]:
    return {f"{key}_token_id": words.convert_tokens_to_ids(name) for key, name in names.items()}


QWEN_IDS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


def qwen2(kind: str) -> tuple[Any, Any]:
    words = tokenizer()
    vision: dict[str, Any] = {**MERGED, "fullatt_block_indexes": [1], "window_size": 56}
    if kind == "Qwen2VL":
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
    config = getattr(hf, f"{kind}Config")(
        text_config=text_config(words, **mrope(1, 1, 2)),
        vision_config=vision,
        tie_word_embeddings=False,
        **token_ids(words, **QWEN_IDS),
    )
    processor = getattr(hf, f"{kind}Processor")(
        hf.Qwen2VLImageProcessor(size=PIXELS),
        words,
        hf.Qwen2VLVideoProcessor(size=PIXELS, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )
    return config, processor


def qwen3(kind: str, **text: Any) -> tuple[Any, Any]:
    words = tokenizer()
    vision = {**MERGED, "num_position_embeddings": 16}
    rope = mrope(2, 1, 1, mrope_interleaved=True)
    if kind.startswith("Qwen3VL"):
        vision["deepstack_visual_indexes"] = [0, 1]
    else:
        rope = mrope(1, 0, 0, mrope_interleaved=True, partial_rotary_factor=0.25)
    config = getattr(hf, f"{kind}Config")(
        text_config=text_config(words, **rope, **text),
        vision_config=vision,
        tie_word_embeddings=False,
        **token_ids(words, **QWEN_IDS),
    )
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(size=PIXELS),
        words,
        hf.Qwen3VLVideoProcessor(
            size={**PIXELS, "longest_edge": 56 * 56 * 6}, patch_size=14, temporal_patch_size=2
        ),
        chat_template=CHAT_TEMPLATE,
    )
    return config, processor


def glm4v() -> tuple[Any, Any]:
    marks = [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]
    words = tokenizer(*marks, image_token="<|image|>", video_token="<|video|>")
    config = hf.Glm4vConfig(
        text_config=text_config(words, **mrope(1, 1, 2)),
        vision_config={**MERGED, "intermediate_size": 32, "image_size": 56},
        tie_word_embeddings=False,
        **token_ids(words, image="<|image|>", video="<|video|>"),
        **token_ids(words, image_start=marks[0], image_end=marks[1]),
        **token_ids(words, video_start=marks[2], video_end=marks[3]),
    )
    template = CHAT_TEMPLATE.replace(
        "<|vision_start|><|video_pad|><|vision_end|>", f"{marks[2]}<|video|>{marks[3]}"
    )
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(size=PIXELS),
        words,
        hf.Glm4vVideoProcessor(size={**PIXELS, "longest_edge": 56 * 56 * 6}),
        chat_template=template,
    )
    return config, processor


def llava_onevision() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>", video_token="<video>")
    vision = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
    config = hf.LlavaOnevisionConfig(
        vision_config={
            **vision,
            "model_type": "siglip_vision_model",
            "patch_size": 7,
            "image_size": 28,
            "vision_use_head": False,
        },
        text_config={**text_config(words), "model_type": "qwen2"},
        vision_feature_layer=-1,
        image_grid_pinpoints=[[28, 28]],
        tie_word_embeddings=False,
        **token_ids(words, image="<image>", video="<video>"),
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=[[28, 28]]),
        words,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        chat_template=CHAT_TEMPLATE.replace(
            "<|vision_start|><|video_pad|><|vision_end|>", "<video>\n"
        ),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return config, processor


def internvl() -> tuple[Any, Any]:
    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = hf.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [7, 7],
        },
        text_config={**text_config(words), "model_type": "qwen2"},
        image_seq_length=4,
        tie_word_embeddings=False,
        **token_ids(words, image="<IMG_CONTEXT>"),
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE),
        words,
        hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace(
            "<|vision_start|><|video_pad|><|vision_end|>", "<video>\n"
        ),
    )
    return config, processor


#: How each is made, by `config.model_type`.
TINY: dict[str, Any] = {
    "qwen2_5_vl": lambda: qwen2("Qwen2_5_VL"),
    "qwen2_vl": lambda: qwen2("Qwen2VL"),
    "qwen3_vl": lambda: qwen3("Qwen3VL"),
    "qwen3_vl_moe": lambda: qwen3("Qwen3VLMoe", **EXPERTS),
    "qwen3_5": lambda: qwen3("Qwen3_5", **LINEAR),
    "glm4v": glm4v,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
}


def save_tiny(model_type: str, folder: Path) -> Path:
    """A stock checkpoint with its processor, lively enough for mistakes to show."""
    config, processor = TINY[model_type]()
    assert config.model_type == model_type
    torch.manual_seed(0)
    model: Any = hf.AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config = hf.GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
