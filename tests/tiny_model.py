"""A tiny random Qwen2.5-VL, prompts for it, and the slow twin that fast paths must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from storm_vlm.model.modeling import enable_latents
from storm_vlm.model.tokens import LatentTokens

# the ids of tests/tiny.py's tokenizer
IMAGE, VIDEO, VISION_START, VISION_END = 262, 263, 259, 260
TOKENS = LatentTokens(start=264, pad=265, end=266)
PADDING, EOS, BUDGET = 256, 258, 4
PIXELS_PER_PATCH = 3 * 2 * 14 * 14


def tiny_config(**changes: Any) -> Qwen2_5_VLConfig:
    text = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 257,
        "eos_token_id": EOS,
        "pad_token_id": PADDING,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        **changes,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id = TOKENS
    config.latent_budget = BUDGET
    return config


def tiny_stock_model(seed: int = 0, **changes: Any) -> Any:
    """A stock model without our mixin, in float32, lively enough for mistakes to show."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(**changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, pad_token_id=PADDING, do_sample=False, max_new_tokens=10
    )
    return model


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    return enable_latents(tiny_stock_model(seed, **changes))


def prompt(
    seed: int, text: int, grid: tuple[int, int, int], seconds: float = 1.0, force: bool = True
) -> dict[str, Tensor]:
    """One prompt: three tokens, a video, ``text`` tokens of question and perhaps
    ``<|latent_start|>``."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 256, (3 + text,), generator=generator)
    video = [VISION_START] + [VIDEO] * (grid[0] * grid[1] * grid[2] // 4) + [VISION_END]
    ids = torch.tensor([*words[:3], *video, *words[3:], *([TOKENS.start] if force else [])])[None]
    patches = grid[0] * grid[1] * grid[2]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
        "pixel_values_videos": torch.randn(patches, PIXELS_PER_PATCH, generator=generator),
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([seconds]),
    }


def prompts(force: bool = True) -> list[dict[str, Tensor]]:
    """Three prompts of unequal length and video size."""
    return [
        prompt(1, 5, (2, 4, 4), 1.0, force),
        prompt(2, 11, (2, 4, 8), 0.75, force),
        prompt(5, 2, (4, 4, 4), 2.5, force),
    ]


def left_pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    length = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        name: torch.cat([row[name] for row in rows])
        for name in rows[0]
        if name[:3] in ("pix", "vid", "sec")
    }
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        padded = [
            torch.nn.functional.pad(row[name], (length - row[name].shape[1], 0)) for row in rows
        ]
        batch[name] = torch.cat(padded)
    return batch


def labels_for(rows: int) -> Tensor:
    """Answers of one to four tokens, right-padded with -100."""
    answers = [[11, EOS], [12, 13, 14, EOS], [15, 16, EOS]]
    return torch.tensor([answer + [-100] * (4 - len(answer)) for answer in answers[:rows]])


def recompute(
    model: Any, row: dict[str, Tensor], ids: list[int], slots: dict[int, Tensor]
) -> Tensor:
    """States (T, D) of prompt + ``ids`` for one unpadded row: no cache, no generate, positions
    spelled out.

    ``slots`` maps indices into ``ids`` to the embedding (D,) that stands there.
    """
    length = row["input_ids"].shape[1]
    positions, _ = model.model.get_rope_index(
        row["input_ids"],
        mm_token_type_ids=row["mm_token_type_ids"],
        video_grid_thw=row["video_grid_thw"],
        second_per_grid_ts=row["second_per_grid_ts"],
    )
    further = positions[..., -1:] + torch.arange(1, len(ids) + 1)
    all_ids = torch.cat([row["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
    embeds = list(model.get_input_embeddings()(all_ids)[0])
    for index, state in slots.items():
        embeds[length + index] = state
    return model.model(
        input_ids=all_ids,
        inputs_embeds=torch.stack(embeds)[None],
        position_ids=torch.cat([positions, further], -1),
        pixel_values_videos=row["pixel_values_videos"].to(embeds[0]),
        video_grid_thw=row["video_grid_thw"],
        use_cache=False,
    ).last_hidden_state[0]
