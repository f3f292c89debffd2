"""What a construction run is told."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from storm_vlm.configs import Settings

Step = Literal["keyframes", "plans", "prompts", "thoughts", "filter"]
STEPS: tuple[Step, ...] = get_args(Step)


class TeacherConfig(Settings):
    """A chat endpoint that sees pictures. Without `model` there is no teacher: keyframes are spread evenly."""

    model: str = Field("", description="The paper's is gpt-4o.")
    base_url: str | None = Field(None, description="By default OpenAI's own; any compatible one.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable of the key.")
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(1024, ge=1, description="Of one answer.")
    detail: Literal["low", "high", "auto"] = Field("low", description="Of the pictures.")
    response_format: Literal["json_schema", "json_object", "none"] = Field(
        "json_schema", description="How JSON is asked for; not every server knows all three."
    )
    repairs: int = Field(2, ge=0, description="Times that the teacher is told what was wrong.")
    retries: int = Field(6, ge=0, description="Of 429, 5xx, timeouts and broken connections.")
    timeout: float = Field(120.0, gt=0, description="Seconds to wait for an answer.")
    price_in: float = Field(0.0, ge=0, description="Money per million prompt tokens.")
    price_out: float = Field(0.0, ge=0, description="Money per million completion tokens.")
    max_cost: float | None = Field(
        None, gt=0, description="No call is begun once the store's calls together cost as much."
    )

    @model_validator(mode="after")
    def _cost_can_be_told(self) -> TeacherConfig:
        if self.max_cost is not None and not self.price_in + self.price_out:
            raise ValueError("max_cost needs prices: set price_in and price_out")
        return self


class WanConfig(Settings):
    """Wan 2.1 image to video, with the values of its model card; the paper states none."""

    model: str = Field("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", description="Folder or hub name.")
    revision: str | None = None
    device: str = Field("cuda", description="cpu for a tiny model only.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Of transformer and text encoder; VAE and image encoder keep float32.",
    )
    area: int = Field(480 * 832, ge=256, description="Pixels of a frame; 720*1280 for 720P models.")
    num_frames: int = Field(81, ge=5, description="4n + 1; at 16 frames a second.")
    steps: int = Field(40, ge=1, description="Of denoising; 4 with a step-distilled LoRA.")
    guidance: float = Field(5.0, description="1 with a step-distilled LoRA: no second pass.")
    flow_shift: float | None = Field(None, description="Of the scheduler; None: the checkpoint's.")
    negative_prompt: str = "camera shake, still picture, subtitles, text overlay, blurred, deformed"
    conditioning: Literal["first", "first_last", "chain"] = Field(
        "first",
        description="`first` keyframe, as in the paper; `first_last` (FLF2V checkpoints) ends at the last one; "
        "`chain` joins segments, each from one keyframe to the next.",
    )
    lora: str | None = Field(None, description="Folder, file or hub name of a step-distilled LoRA.")
    lora_file: str | None = Field(None, description="Its file, where a hub name holds several.")
    offload: Literal["none", "model", "group"] = Field(
        "none", description="`model`: whole parts wait in main memory; `group`: single blocks do."
    )

    @model_validator(mode="after")
    def _frames_fit(self) -> WanConfig:
        if self.num_frames % 4 != 1:
            raise ValueError(f"num_frames must be 4n + 1 (33, 49, 81), got {self.num_frames}")
        return self


class FilterConfig(Settings):
    """Thresholds of `filters.py`; null switches one off. A row is rejected on the wrong side of one."""

    blank: float | None = Field(0.02, description="At least.")
    frozen: float | None = Field(0.004, description="At least.")
    flicker: float | None = Field(0.05, description="At most.")
    mismatch: float | None = Field(0.15, description="At most.")
    off_topic: float | None = Field(0.9, description="At most; needs `off_topic_model`.")
    duplicate: float | None = Field(0.05, description="At least; what encoding does is below 0.03.")


class BuildConfig(Settings):
    """One run. What decides a row's result is part of its key in the store; the rest may change freely."""

    steps: tuple[Step, ...] = STEPS
    generator: Literal["wan", "future", "keyframes", "world"] = "wan"
    splits: tuple[Literal["train", "validation"], ...] = Field(
        ("train",), description="Rows of other splits are refused: the teacher is told answers."
    )
    replace: bool = Field(False, description="Make thought videos anew where rows have one.")
    candidates: int = Field(32, ge=1, description="Frames that the teacher chooses from.")
    max_side: int = Field(512, ge=16, description="Pixels of the longer side of what it sees.")
    keyframes: int = Field(4, ge=1, le=8, description="K at most; the paper does not say.")
    show_answer: bool = Field(True, description="Tell the teacher the correct answer (appendix B).")
    seed: int = 0
    future_seconds: float = Field(4.0, gt=0, description="Of `future`, from the row's end on.")
    off_topic_model: str | None = Field(None, description="Folder or hub name, CLIP or SigLIP.")
    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig.model_validate({}))
    wan: WanConfig = Field(default_factory=lambda: WanConfig.model_validate({}))
    filters: FilterConfig = Field(default_factory=lambda: FilterConfig.model_validate({}))
    workers: int = Field(8, ge=1, description="Rows in work at a time.")

    def determining(self) -> dict[str, Any]:
        """All that a row's result depends on, besides the row. Thresholds do not: scores are kept."""
        free = {
            "base_url",
            "api_key_env",
            "retries",
            "timeout",
            "price_in",
            "price_out",
            "max_cost",
        }
        unused: dict[str, Any] = {"workers": True, "filters": True, "splits": True, "teacher": free}
        if not self.teacher.model:
            unused["teacher"] = True
        if self.generator != "wan":
            unused["wan"] = True
        return self.model_dump(mode="json", exclude=unused)
