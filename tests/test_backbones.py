"""The seam for backbones: Qwen2-VL, which has no adapter of ours, with and without one."""

from typing import Any

import pytest
import torch
from tiny_model import (
    BUDGET,
    IMAGE,
    TOKENS,
    VIDEO,
    VISION_END,
    VISION_START,
    left_pad,
    prompts,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from storm_vlm.errors import StormError
from storm_vlm.model.backbones import BACKBONES, Backbone, backbone
from storm_vlm.model.modeling import enable_latents
from storm_vlm.model.positions import TrainedPositions
from storm_vlm.model.rollout import rollout


def qwen2_vl() -> Any:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "rope_parameters")
    text = tiny_config().text_config
    config = Qwen2VLConfig(
        text_config={"bos_token_id": 257, **{name: getattr(text, name) for name in names}},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id = TOKENS
    config.latent_budget = BUDGET
    torch.manual_seed(0)
    model: Any = Qwen2VLForConditionalGeneration(config).eval().double()
    model.generation_config = GenerationConfig(max_new_tokens=BUDGET + 2, do_sample=False)
    return model


def batch_of() -> dict[str, Tensor]:
    batch = left_pad(prompts())
    del batch["second_per_grid_ts"]  # Qwen2-VL has no clock
    return batch


def latent_states(model: Any) -> Tensor:
    options = {"output_latent_states": True, "return_dict_in_generate": True}
    return model.generate(**batch_of(), **options).latent_states


def test_without_an_adapter_there_is_the_latent_rollout_of_generate_alone() -> None:
    stock_core = type(qwen2_vl().model)
    model = enable_latents(qwen2_vl())
    assert type(model.model) is stock_core
    assert latent_states(model).abs().sum(-1).gt(0).all()
    with pytest.raises(StormError, match=r"backbones.*'qwen2_vl'.*qwen2_5_vl"):
        rollout(model, batch_of(), BUDGET)


@torch.no_grad()
def test_another_packages_adapter_makes_training_roll_out_as_generate_does(monkeypatch) -> None:
    monkeypatch.setattr(BACKBONES, "_parts", dict(BACKBONES._parts))

    class Marked:
        mark = "a mixin of the adapter"

    @BACKBONES.register("qwen2_vl")
    class Qwen2VL(Backbone):
        core_mixins = (Marked,)

    model = enable_latents(qwen2_vl())
    assert isinstance(backbone(model), Qwen2VL) and model.model.mark == Marked.mark
    states = rollout(model, batch_of(), BUDGET).states
    torch.testing.assert_close(states, latent_states(model), atol=1e-6, rtol=0)


def test_the_parts_of_a_qwen2_5_vl() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    wrapped = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    for whole, stock in ((model, model), (wrapped, wrapped.get_base_model())):
        found = backbone(whole)
        assert found.core is stock.model and isinstance(found.core, TrainedPositions)
        assert found.vision_tower is stock.model.visual
        assert found.decoder is stock.model.language_model and len(found.decoder.layers) == 3
        assert found.video_token_id == VIDEO


def test_a_frozen_tower_is_not_differentiated_and_a_trained_one_is() -> None:
    model, row = tiny_model(), prompts()[0]
    video = row["pixel_values_videos"], row["video_grid_thw"]
    for get in (model.model.get_video_features, model.model.get_image_features):
        model.model.visual.requires_grad_(True)
        assert get(*video).pooler_output[0].requires_grad
        with torch.no_grad():
            assert not get(*video).pooler_output[0].requires_grad
        model.model.visual.requires_grad_(False)
        # as checkpointing makes them
        hook = model.model.visual.patch_embed.register_forward_hook(
            lambda _module, _args, output: output.requires_grad_(torch.is_grad_enabled())
        )
        assert not get(*video).pooler_output[0].requires_grad
        asked = video[0].clone().requires_grad_()
        assert get(asked, video[1]).pooler_output[0].requires_grad
        hook.remove()
