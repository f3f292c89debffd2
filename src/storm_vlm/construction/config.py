"""What a construction run is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from storm_vlm.configs import Settings
from storm_vlm.construction.generators import GENERATORS

StepName = Literal["keyframes", "plans", "prompts", "thoughts", "filter"]
STEPS: tuple[StepName, ...] = get_args(StepName)


class TeacherConfig(Settings):
    """A chat endpoint that sees pictures. Without `model` there is no teacher: keyframes are spread evenly."""

    model: str = Field("", description="The paper's is gpt-4o.")
    base_url: str | None = Field(None, description="By default OpenAI's own; any compatible one.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable of the key.")
    temperature: float = Field(0.0, ge=0, description="Of the teacher's sampling.")
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


class FilterConfig(Settings):
    """Thresholds of `filters.py`; null switches one off. A row is rejected on the wrong side of one."""

    blank: float | None = Field(0.02, description="At least.")
    frozen: float | None = Field(0.06, description="At least.")
    flicker: float | None = Field(0.05, description="At most.")
    mismatch: float | None = Field(0.15, description="At most.")
    off_topic: float | None = Field(0.9, description="At most; needs `off_topic_model`.")
    visual_gain: float | None = Field(0.0, description="At least; needs `visual_gain_model`.")
    duplicate: float | None = Field(0.05, description="At least; what encoding does is below 0.03.")


class BuildConfig(Settings):
    """One run. What decides a row's result is part of its key in the store; the rest may change freely."""

    steps: tuple[StepName, ...] = Field(STEPS, description="Which are run, in this order.")
    generator: Annotated[str, AfterValidator(GENERATORS.check)] = Field(
        "wan", description="What makes thought videos: a name of the registry."
    )
    generator_config: SerializeAsAny[BaseModel] = Field(
        {}, validate_default=True, description="Settings of the generator: its own `Config`."
    )
    splits: tuple[Literal["train", "validation"], ...] = Field(
        ("train",), description="Rows of other splits are refused: the teacher is told answers."
    )
    replace: bool = Field(False, description="Make thought videos anew where rows have one.")
    candidates: int = Field(32, ge=1, description="Frames that the teacher chooses from.")
    max_side: int = Field(512, ge=16, description="Pixels of the longer side of what it sees.")
    keyframes: int = Field(4, ge=1, le=8, description="K at most; the paper does not say.")
    show_answer: bool = Field(True, description="Tell the teacher the correct answer (appendix B).")
    seed: int = Field(0, description="Of the generator, for every row.")
    off_topic_model: str | None = Field(None, description="Folder or hub name, CLIP or SigLIP.")
    visual_gain_model: str | None = Field(
        None, description="Folder or hub name of a video model that is to find the answer likelier."
    )
    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig.model_validate({}))
    filters: FilterConfig = Field(default_factory=lambda: FilterConfig.model_validate({}))
    workers: int = Field(8, ge=1, description="Rows in work at a time.")
    max_errors: float = Field(
        1.0, ge=0, le=1, description="Share of rows that may be odd before the first is worked on."
    )

    @field_validator("generator_config", mode="plain")
    @classmethod
    def _of_the_generator(cls, value: Any, info: ValidationInfo) -> BaseModel:
        if "generator" not in info.data:  # its own fault is reported
            return Settings()
        return GENERATORS[info.data["generator"]].Config.model_validate(value)

    @model_validator(mode="after")
    def _cost_can_be_told(self) -> BuildConfig:
        teacher = self.teacher
        if teacher.max_cost is not None and not teacher.price_in + teacher.price_out:
            raise ValueError("teacher.max_cost needs prices: set price_in and price_out")
        return self

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
        unused: dict[str, Any] = dict.fromkeys(("workers", "max_errors", "filters", "splits"), True)
        unused["teacher"] = free
        if not self.teacher.model:
            unused["teacher"] = True
        if not self.visual_gain_model:  # as before there was one
            unused["visual_gain_model"] = True
        return self.model_dump(mode="json", exclude=unused)
