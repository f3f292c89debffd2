"""The `direct`, `cot` and `grounded_cot` reasoners. Tags are the protocols' own, the words are ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from storm_vlm.data.prompt import question_text
from storm_vlm.inference.chat import ChatModel, Conversation
from storm_vlm.inference.frames import Frames, QuestionLike
from storm_vlm.inference.local_chat import chat_model
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.inference.reply import Reply

_FINALLY = "give only the answer{letter} between <answer> and </answer>."


class Direct(Reasoner):
    """One question, one turn, which is the answer."""

    INSTRUCTION: ClassVar[str | None] = None  #: how to answer; None leaves it to `question_text`

    def __init__(
        self, model: StormPipeline | ChatModel, frames: Frames, max_new_tokens: int | None = None
    ) -> None:
        super().__init__(frames, max_new_tokens)
        self.chat = chat_model(model)

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, **self.chat.settings}

    def prompt(self, question: QuestionLike) -> str:
        letter = ", as the option's letter," if question.options else ""
        instruction = self.INSTRUCTION and self.INSTRUCTION.format(letter=letter)
        return question_text(question.question, question.options, instruction)

    def answer(self, questions: Sequence[QuestionLike]) -> list[Reply]:
        conversations = [
            Conversation(question, self.frames, lambda question, _: self.prompt(question))
            for question in questions
        ]
        turns = [conversation.turns for conversation in conversations]
        completions = self.chat.write(turns, self.max_new_tokens)
        for conversation, completion in zip(conversations, completions, strict=True):
            conversation.add(completion)
        return [conversation.reply() for conversation in conversations]


class ChainOfThought(Direct):
    """Thinks in words first. A chain that is cut off has no answer."""

    MAX_NEW_TOKENS: ClassVar[int] = 1024
    INSTRUCTION: ClassVar[str | None] = (
        "First think it through between <think> and </think>. Then " + _FINALLY
    )


class GroundedChainOfThought(Direct):
    """Describes the parts of the video first, with their times."""

    MAX_NEW_TOKENS: ClassVar[int] = 2048
    INSTRUCTION: ClassVar[str | None] = (
        "Go through the parts of the video that matter, in order. For each, write when it is as "
        "<time>start-end</time> in seconds, what is seen then as <caption>...</caption>, and what follows from it "
        "as <think>...</think>. Then " + _FINALLY
    )
