"""The reasoners are not tied to Qwen2.5-VL: a LLaVA-OneVision with random weights, saved and loaded as any is."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from storm_vlm import StormPipeline
from storm_vlm.errors import StormError
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.reasoners import build_reasoner, default_reasoner
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.backbone import CHAT_TEMPLATE

SIDE, PATCH = 28, 14


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> StormPipeline:
    tokenizer = AutoProcessor.from_pretrained(shipped("backbone")).tokenizer
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "patch_size": PATCH,
            "image_size": SIDE,
            "vision_use_head": False,
            **decoder,
            **heads,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **decoder,
            **heads,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    torch.manual_seed(0)
    size = {"height": SIDE, "width": SIDE}
    template = CHAT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        chat_template=template.replace("<|video_pad|>", "<video>"),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    folder: Path = tmp_path_factory.mktemp("llava")
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return StormPipeline.from_pretrained(str(folder), device="cpu", num_frames=4)


@pytest.mark.parametrize("name", ["direct", "cot", "grounded_cot", "tools"])
def test_every_protocol_runs_and_batches(llava, reasoning_rows, name) -> None:
    reasoner = build_reasoner(name, llava, Frames(4), 6)
    together = reasoner.answer(reasoning_rows[:3])
    assert [r.text for r in together] == [
        reasoner.answer([row])[0].text for row in reasoning_rows[:3]
    ]
    for reply in together:
        assert reply.tokens == 6 and len(reply.frame_times) == 4
        assert (
            reply.visual_tokens == 4 * 1 + 1
        )  # 2 x 2 patches pooled to one a frame, and a new line
        assert reply.seconds["vision"] > 0


def test_a_bound_on_pixels_it_does_not_know_is_refused(llava) -> None:
    with pytest.raises(StormError, match="max_pixels"):
        StormPipeline.from_pretrained(llava.model.name_or_path, max_pixels=1000)


def test_it_has_no_latent_slots(llava) -> None:
    assert default_reasoner(llava) == "direct"
    with pytest.raises(StormError, match="slots"):
        build_reasoner("latent", llava, Frames(4))
