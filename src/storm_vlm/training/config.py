"""A training run as a YAML file. A stage of the paper is such a file, not a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from storm_vlm.configs import ConfigError, Settings, parse_config
from storm_vlm.model.latent import AlignmentReduction, TargetNormalization

__all__ = ["ConfigError", "Method", "TrainConfig", "load_config"]

FRAMES_PER_SLOT = 2  # one temporal grid of Qwen2.5-VL
TargetSource = Literal["thought_video", "future", "keyframes", "self_distilled", "shuffled", "none"]


class Method(Settings):
    """What the paper fixes, with its values as defaults, and what it leaves open, with our choice.

    The reason for each choice is in `docs/paper_map.md`.
    """

    latent_budget: int = Field(
        8, ge=0, description="K (sec. 4.1). 0: no latent segment, plain SFT."
    )
    alignment_weight: float = Field(
        0.1, ge=0, description="Weight of the alignment loss (Eq. 4). Stage I 0.1, Stage II 0."
    )
    slot_input: Literal["target", "rollout", "scheduled", "pause"] = Field(
        "rollout",
        description="What slots are fed with in training: the thought video's targets, the model's own states, "
        "targets first and ever more own states (`target_share`), or, as a control, the <|latent_pad|> embedding.",
    )
    target_source: TargetSource = Field(
        "thought_video",
        description="Where targets come from: the thought video; what really comes after `Row.end`; the keyframes "
        "alone; an average of the model's own past that reads the thought video (`training/distillation.py`); "
        "another row's thought video (a control); or nowhere (pause slots).",
    )
    ema_decay: float = Field(
        0.9999,
        ge=0,
        le=1,
        description="Of the `self_distilled` teacher, per optimizer step. With 0.999 the micro world's targets "
        "change faster than they are learned.",
    )
    target_frames: int | None = Field(
        None,
        ge=1,
        description="Frames sampled from what targets are made from; default 2 K, so that each temporal grid of two "
        "is one slot's. Where their tokens are K in number, nothing is averaged (Table 5).",
    )
    target_normalization: TargetNormalization = Field(
        "whiten", description="`none` is raw visual tokens; see `latent.target_whitening`."
    )
    alignment_reduction: AlignmentReduction = Field(
        "mean",
        description="Over the hidden size: `mean` is the usual MSE, `sum` the squared distance.",
    )
    boundary_weight: float = Field(
        1.0, ge=0, description="Weight of the cross-entropy on <|latent_start|> and <|latent_end|>."
    )
    detach_feedback: bool = Field(
        False, description="Cut the gradient through states that are fed back."
    )
    bottleneck: Literal["none", "answer", "scheduled"] = Field(
        "none",
        description="answer: <|latent_end|> and the answer do not attend to the video, in training and after it, so "
        "that what they know of it comes by the slots (and by the question's states, which have seen it). scheduled: "
        "in training, for ever more rows (`bottleneck_share`).",
    )

    @property
    def num_target_frames(self) -> int:
        """Frames that a row's targets are made from."""
        return self.target_frames or FRAMES_PER_SLOT * self.latent_budget

    @property
    def needs_targets(self) -> bool:
        """Whether training looks at targets at all."""
        wanted = self.alignment_weight or self.slot_input in ("target", "scheduled")
        return bool(self.latent_budget and wanted)

    @model_validator(mode="after")
    def _fits(self) -> Method:
        if self.slot_input == "pause" and self.alignment_weight:
            raise ValueError("pause slots have no state to align: set alignment_weight to 0")
        if self.bottleneck != "none" and not self.latent_budget:
            raise ValueError("a bottleneck needs slots to go through: set latent_budget, too")
        if self.target_source == "none" and self.needs_targets:
            raise ValueError(
                "target_source none: set alignment_weight to 0 and slot_input to pause or rollout"
            )
        return self


class TrainConfig(Settings):
    """One run: which model, on which rows, by which method.

    `training` holds the fields of transformers' TrainingArguments, under their own names.
    """

    ALTERNATIVES: ClassVar = {
        "training.max_steps": "training.num_train_epochs",
        "training.num_train_epochs": "training.max_steps",
    }

    model: str = Field(
        description="Folder or hub name to start from; for Stage II, Stage I's folder."
    )
    data: str = Field(
        description="A JSONL file of rows. Those of the split `validation` are for evaluations."
    )
    output_dir: str = Field(
        min_length=1, description="Folder for checkpoints, curves and the trained model."
    )
    num_frames: int = Field(32, ge=1, description="Spread evenly over each clip.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the weights; `auto` is the checkpoint's."
    )
    attn_implementation: str | None = Field(
        None, description="As in transformers; by default the fastest that is installed."
    )
    freeze_vision: bool = Field(
        True, description="Leave the vision tower as it is, so that targets can be computed once."
    )
    lora: dict[str, Any] | None = Field(
        None, description="Fields of PEFT's LoraConfig. The latent tokens' embeddings train, too."
    )
    quantization: dict[str, Any] | None = Field(
        None, description="Fields of transformers' BitsAndBytesConfig (QLoRA); needs `lora`."
    )
    skip_bad_rows: bool = Field(
        False,
        description="Train without rows that cannot be worked on (a missing or odd clip, control tokens, more than "
        "26 options). By default a run does not begin with such rows.",
    )
    eval_samples: int = Field(
        8, ge=0, description="Validation questions answered at each evaluation (`eval_strategy`)."
    )
    video_cache_gb: float = Field(
        1.0, ge=0, description="Memory of a process for clips that were read and preprocessed."
    )
    target_cache: str | None = Field(
        None,
        description="Folder of the alignment targets; default: beside `data`, in `<data>.targets`.",
    )
    vision_cache: str | None = Field(
        None,
        description="Folder for what the frozen vision tower makes of each clip: computed once, then read by every "
        "epoch and run in place of the videos. Takes N x D numbers a clip (at 7B 7 KiB a token).",
    )
    muon: dict[str, Any] | None = Field(
        None,
        description="Fields of timm's Muon, which then moves the decoder's matrices, and NAdamW all else (with "
        "`training.learning_rate`). On the micro world it needs half of AdamW's steps. None: `training.optim`.",
    )
    method: Method = Field(
        default_factory=lambda: Method.model_validate({}), description="See `Method`."
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="Fields of transformers' TrainingArguments."
    )

    @field_validator("training")
    @classmethod
    def _no_is_a_strategy(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """YAML's `no` is false; the strategies (`eval_strategy`, `save_strategy` …) have one of that name."""
        return {
            name: "no" if value is False and name.endswith("_strategy") else value
            for name, value in fields.items()
        }

    @model_validator(mode="after")
    def _only_a_frozen_tower_can_be_kept(self) -> TrainConfig:
        if self.vision_cache is not None and not self.freeze_vision:
            raise ValueError(
                "a tower that trains makes ever other features: leave out vision_cache"
            )
        return self

    @model_validator(mode="after")
    def _quantized_models_need_adapters(self) -> TrainConfig:
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantized weights cannot be trained: set lora, too")
        return self


def load_config(path: str | Path, *overrides: Iterable[str] | Mapping[str, Any]) -> TrainConfig:
    """Read a YAML file; `overrides` are `key=value` (`training.max_steps=10`) or a mapping; see `parse_config`.

    Raises:
        ConfigError: unreadable, an unknown key, or a value of the wrong kind.
    """
    return parse_config(TrainConfig, path, *overrides)
