"""The micro backbones: stock classes, a tiny configuration and a tokenizer trained on the world's words."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

PATCH = 8  # pixels; merged 2 x 2 and over 2 frames, so a visual token is one cell for one step
IMAGE_SIDE = 64  # pixels; what the processor scales a clip to
AREA = {"shortest_edge": IMAGE_SIDE**2, "longest_edge": IMAGE_SIDE**2}
VOCABULARY = 512  # rows of the embedding table; the tokenizer leaves some spare, as Qwen's does
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# ChatML as Qwen2.5-VL writes it, with its default system turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class MicroFamily:
    """What differs from one family to the next."""

    config: type
    processor: type
    video_processor: type
    size: Mapping[str, Any]  #: of clips: every frame becomes IMAGE_SIDE squared (or that area)
    rope: Mapping[str, Any]
    vision: Mapping[str, Any]
    words: tuple[str, ...] = ()  #: that the processor writes into prompts


ModelType = Literal["qwen2_5_vl", "qwen3_vl"]
FAMILIES: dict[ModelType, MicroFamily] = {
    "qwen2_5_vl": MicroFamily(
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        {"size": AREA},
        {"mrope_section": [4, 6, 6]},
        {"fullatt_block_indexes": [0, 1], "window_size": IMAGE_SIDE, "tokens_per_second": 2},
    ),
    "qwen3_vl": MicroFamily(
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        {
            "size": {"shortest_edge": IMAGE_SIDE**2 // 2, "longest_edge": 64 * IMAGE_SIDE**2},
            "cap_pixels_per_frame": True,
            "max_video_tokens": (IMAGE_SIDE // PATCH // 2) ** 2,
        },
        {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        {"deepstack_visual_indexes": [0], "num_position_embeddings": (IMAGE_SIDE // PATCH) ** 2},
        tuple(f"<{tenth / 10} seconds>" for tenth in range(30)),
    ),
}


def micro_processor(texts: Iterable[str], model_type: ModelType = "qwen2_5_vl") -> Any:
    """A byte-level BPE tokenizer trained on `texts`, with Qwen's special tokens, and the family's video processor."""
    family, tokenizer = FAMILIES[model_type], Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - 16,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *100 * family.words], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    vision: dict[str, Any] = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    return family.processor(
        image_processor=Qwen2VLImageProcessor(size=AREA, **vision),
        tokenizer=fast,
        video_processor=family.video_processor(**family.size, **vision),
        chat_template=CHAT_TEMPLATE,
    )


def micro_config(processor: Any, model_type: ModelType = "qwen2_5_vl") -> Any:
    """About 1.3 M parameters."""
    ids, family = processor.tokenizer.convert_tokens_to_ids, FAMILIES[model_type]
    rope = {"rope_type": "default", "rope_theta": 10000.0, **family.rope}
    return family.config(
        text_config={
            "vocab_size": VOCABULARY,
            "initializer_range": 0.04,
            "hidden_size": 128,
            "head_dim": 32,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": rope,
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "initializer_range": 0.04,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            **family.vision,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def deepen(checkpoint: Path, folder: Path, num_layers: int) -> Path:
    """A deeper backbone that computes the same: the shipped one with further decoder layers spread between its own.

    A new layer adds nothing at first (its two output projections are zero) and learns from there, so a second size
    needs no pretraining of its own. Saved to `folder`, which is returned; left alone if it is there.
    """
    if folder.exists():
        return folder
    unfinished = folder.with_name(folder.name + ".unfinished")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    text: Any = model.config.text_config
    layers: Any = model.model.language_model.layers
    depth = len(layers)
    for added in range(num_layers - depth):
        place = round((added + 1) * depth / (num_layers - depth + 1)) + added
        new = copy.deepcopy(layers[place - 1])
        for name, weight in new.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(weight)
        layers.insert(place, new)
    text.num_hidden_layers, text.layer_types = num_layers, [text.layer_types[0]] * num_layers
    model.save_pretrained(unfinished)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(unfinished)
    return unfinished.rename(folder)
