"""Wans of a few thousand random weights, in the folder layouts of the published checkpoints."""

from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from tiny import tiny_processor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

HIDDEN = 16


Kind = Literal["2.1", "2.1 flf2v", "2.2 a14b", "2.2 5b"]


def save_tiny_wan(folder: Path, kind: Kind = "2.1") -> str:
    """FLF2V is led to a last picture; A14B has two transformers; 5B a VAE of its own and a time for each token."""
    torch.manual_seed(0)
    tokenizer = tiny_processor().tokenizer
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=HIDDEN,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    small = kind == "2.2 5b"

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=8 if small else 36,
            out_channels=8 if small else 16,
            text_dim=HIDDEN,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            image_dim=HIDDEN if kind.startswith("2.1") else None,
            # two pictures of 4 patches and a class
            pos_embed_seq_len=2 * 5 if kind == "2.1 flf2v" else None,
            rope_max_seq_len=32,
        )

    of_small = {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 8,
        "latents_std": [1.0] * 8,
    }
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=8 if small else 16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **(of_small if small else {}),
    )
    two = kind == "2.2 a14b"
    old = kind.startswith("2.1")
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        if old
        else None,
        image_encoder=CLIPVisionModel(vision) if old else None,
        transformer=transformer(),
        transformer_2=transformer() if two else None,
        boundary_ratio=0.9 if two else None,
        expand_timesteps=small,
    ).save_pretrained(folder)
    return str(folder)
