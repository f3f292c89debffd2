"""From a question to the text the model reads (`answer.py` reads what it writes).

Training, evaluation and serving all build their prompts here, so they cannot drift apart.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, Literal

from storm_vlm.data.row import Row
from storm_vlm.errors import InputError


class PromptError(InputError):
    """A question or an answer that cannot be put to a model."""


LatentMode = Literal["force", "auto", "off"]
LATENT_MODES: tuple[LatentMode, ...] = ("force", "auto", "off")
LATENT_START = "<|latent_start|>"

OPTIONS_INSTRUCTION = "Answer with the option's letter."

_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")


def option_letter(index: int) -> str:
    """0 -> "A", 1 -> "B", ... Raises `PromptError` beyond "Z"."""
    if not 0 <= index < len(ascii_uppercase):
        raise PromptError(f"option {index}: a question can have at most 26 options")
    return ascii_uppercase[index]


def question_text(
    question: str, options: Sequence[str] = (), instruction: str | None = None
) -> str:
    """What is asked, line by line: the question, its lettered options, how to answer.

    ``instruction`` None: `OPTIONS_INSTRUCTION` where there are options, else nothing. Raises
    `PromptError` for text that holds control tokens such as ``<|im_end|>``, which would otherwise
    end the turn or claim a video that is not there.
    """
    lines = [question.strip()]
    lines += [f"{option_letter(i)}. {option}" for i, option in enumerate(options)]
    if instruction is None and options:
        instruction = OPTIONS_INSTRUCTION
    return _plain("\n".join([*lines, instruction] if instruction else lines))


def build_messages(
    question: str, options: Sequence[str] = (), num_videos: int = 1
) -> list[dict[str, Any]]:
    """One user turn in the chat format of transformers: the videos, then the question.

    No system message: the model's own chat template adds the one it was trained with. Raises
    `PromptError` as `question_text` does.
    """
    text = question_text(question, options)
    videos: list[dict[str, Any]] = [{"type": "video"} for _ in range(num_videos)]
    return [{"role": "user", "content": [*videos, {"type": "text", "text": text}]}]


def answer_text(row: Row) -> str:
    """What the model must write: the letter of the right option, else the answer itself."""
    if row.options:
        return option_letter(row.options.index(row.answer))
    return _plain(row.answer.strip())


def render_prompt(processor: Any, messages: list[dict[str, Any]], latent_mode: LatentMode) -> str:
    """The prompt up to where the model starts writing.

    "force" opens the latent segment by ending in ``<|latent_start|>``; in "auto" the model may
    open it itself; in "off" it may not (both end where the assistant's turn starts).
    """
    if latent_mode not in LATENT_MODES:
        raise InputError(f"latent_mode must be one of {LATENT_MODES}, got {latent_mode!r}")
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt + LATENT_START if latent_mode == "force" else prompt


def without_control_tokens(text: str) -> str:
    """What a model wrote, so that reading it again in a conversation neither ends a turn nor claims a video."""
    return _CONTROL_TOKEN.sub("", text)


def _plain(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"text holds what is no character: write {text!r} in UTF-8")
    if found := _CONTROL_TOKEN.search(text):
        raise PromptError(f"text holds the control token {found[0]!r}: remove it from {text!r}")
    return text
