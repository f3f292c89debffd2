"""Ways to reason about a video on one backbone, with one reader, one scorer and one clock.

`latent` is STORM; `direct` writes the answer; `cot` a chain of thought before it (Video-R1's protocol);
`grounded_cot` a chain of captions with their times (Video-Thinker's); `tools` may look at parts of the video again
(LongVT's). All but the first run on any `ChatModel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from storm_vlm.errors import StormError
from storm_vlm.registry import Registry

if TYPE_CHECKING:
    from storm_vlm.inference.chat import ChatModel
    from storm_vlm.inference.frames import Frames, QuestionLike
    from storm_vlm.inference.pipeline import StormPipeline
    from storm_vlm.inference.reply import Reply


class Reasoner(ABC):
    """Answers questions about videos. `build_reasoner` calls the class with a model, frames and a bound on tokens."""

    MAX_NEW_TOKENS: ClassVar[int] = 32  #: of a turn, where the caller sets no bound
    NEEDS_SLOTS: ClassVar[bool] = False  #: the checkpoint must have latent slots

    def __init__(self, frames: Frames, max_new_tokens: int | None = None) -> None:
        self.frames, self.max_new_tokens = frames, max_new_tokens or self.MAX_NEW_TOKENS

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides its answers, as JSON, for the record."""

    @abstractmethod
    def prompt(self, question: QuestionLike) -> str:
        """The text that a question is put with."""

    @abstractmethod
    def answer(self, questions: Sequence[QuestionLike]) -> list[Reply]:
        """One reply each, in order. Raises VideoError, PromptError, RefusedError, EndpointError."""


REASONERS: Registry[type[Reasoner]] = Registry(
    "reasoners",
    {
        "latent": f"{__name__}.latent:Latent",
        "direct": f"{__name__}.single_turn:Direct",
        "cot": f"{__name__}.single_turn:ChainOfThought",
        "grounded_cot": f"{__name__}.single_turn:GroundedChainOfThought",
        "tools": f"{__name__}.tool_loop:ToolLoop",
    },
)


def default_reasoner(model: StormPipeline | ChatModel) -> str:
    """`latent` for a pipeline with slots, else `direct`."""
    return "direct" if getattr(model, "latent_mode", "off") == "off" else "latent"


def build_reasoner(
    name: str,
    model: StormPipeline | ChatModel,
    frames: Frames,
    max_new_tokens: int | None = None,
) -> Reasoner:
    """The reasoner of that name. Raises StormError: an unknown one, or one that needs slots without slots."""
    reasoner: Any = REASONERS[name]
    if reasoner.NEEDS_SLOTS and getattr(model, "latent_mode", "off") == "off":
        raise StormError(
            f"the {name} reasoner needs a checkpoint that has latent slots: train one with storm train"
        )
    return reasoner(model, frames, max_new_tokens)
