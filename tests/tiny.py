"""A processor with Qwen2.5-VL's special tokens and chat format, and a training run: both take no time."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from storm_vlm.lab.world.backbone import CHAT_TEMPLATE, SPECIAL
from storm_vlm.training.config import Method, TrainConfig

LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")


def tiny_processor(with_latent_tokens: bool = True) -> Qwen2_5_VLProcessor:
    """Byte-level tokenizer (ids 0-255 are bytes, then the special tokens) and 28..112 px videos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = SPECIAL + (LATENT_TOKENS if with_latent_tokens else ())
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_run(
    folder: Path, backbone: str, rows: Path, method: Method, max_steps: int
) -> TrainConfig:
    return TrainConfig(
        model=backbone,
        data=str(rows),
        output_dir=str(folder / "out"),
        num_frames=6,
        method=method,
        training={
            "max_steps": max_steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    )
