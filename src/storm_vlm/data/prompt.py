"""From a question to the text the model reads, and from the text it writes back to an answer.

Training, evaluation and serving all build their prompts here, so they cannot drift apart.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, Literal

from storm_vlm.data.moment import RIGHT, overlap, parse_moment
from storm_vlm.data.row import Row
from storm_vlm.errors import InputError


class PromptError(InputError):
    """A question or an answer that cannot be put to a model."""


LatentMode = Literal["force", "auto", "off"]
LATENT_MODES: tuple[LatentMode, ...] = ("force", "auto", "off")
LATENT_START = "<|latent_start|>"

OPTIONS_INSTRUCTION = "Answer with the option's letter."

_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")
# A capital that is a word of its own: not "A-list", not "A's"; and none of several ("A or B").
_LETTER = r"\(?([A-Z])\b\)?(?![\w'\u2019-])"
_SEVERAL = r"(?!\s*(?:,|/|&|or\b|and\b)\s*(?i:option\s+){0,%d}\(?[A-Z]\b)"
_LONE = re.compile(r"\(([A-Za-z])\)|([A-Za-z])(?:[.):](?!\S)|[ \t]*(?:\n|$))")
_STATED = re.compile(
    r"(?i:\banswer(?:\s+is\b\s*:?|\s*:)\s*(?:option\s+)?)" + _LETTER + _SEVERAL % 1
)
_NAMED = re.compile(r"(?i:\boption\s+(?:is\s+)?)" + _LETTER + _SEVERAL % 0)


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


def parse_answer(text: str, options: Sequence[str], labels: Sequence[str] = ()) -> int | None:
    """The index of the option that ``text`` chooses, None if it does not clearly choose one.

    Looks inside the last ``<answer>`` only, if there is one. Then takes a letter that stands alone
    at the start ("C", "(C)", "C. red"), else the last "answer is C", else the one "option C" that
    is named, else the option that the text repeats word for word ("Red."); where a benchmark numbers its
    options in another way, the label of one ("Caption 2", with or without the option) says it, too. Never
    guesses: "A man walks" is no answer, nor is a letter without an option.
    """
    text = _final(text).replace("*", "").strip()
    if lone := _LONE.match(text):
        letter = lone[1] or lone[2]
    elif stated := _STATED.findall(text):
        letter = stated[-1]
    elif len(named := set(_NAMED.findall(text))) == 1:
        letter = named.pop()
    else:
        return _repeated(text, options, labels)
    index = ascii_uppercase.index(letter.upper())
    return index if index < len(options) else None


def _repeated(text: str, options: Sequence[str], labels: Sequence[str]) -> int | None:
    forms = [{_normalised(option)} for option in options]
    for form, label, option in zip(forms, labels, options, strict=False):
        form |= {_normalised(label), _normalised(f"{label}: {option}")}
    said = _normalised(text)
    chosen = [index for index, form in enumerate(forms) if said in form]
    return chosen[0] if len(chosen) == 1 else None


def is_correct(text: str, row: Row) -> bool | None:
    """Whether ``text`` answers the row; None if it cannot be parsed (which counts as wrong).

    Free-text answers must be equal up to case, white space and a trailing period. ``meta["labels"]`` holds a
    benchmark's own labels of the options, if it has any; ``meta["moment"]`` the start and end, in seconds of what is
    shown, that a question of temporal grounding asks for: the answer must meet them by half.
    """
    if row.options:
        index = parse_answer(text, row.options, row.meta.get("labels", ()))
        return None if index is None else row.options[index] == row.answer
    text = _final(text)
    if moment := row.meta.get("moment"):
        found = parse_moment(text)
        return None if found is None else overlap(found, moment) >= RIGHT
    return _normalised(text) == _normalised(row.answer) if text.strip() else None


def _final(text: str) -> str:
    """What stands in the last ``<answer>``, else all."""
    return text.rsplit("<answer>", 1)[1].split("</answer>", 1)[0] if "<answer>" in text else text


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def without_control_tokens(text: str) -> str:
    """What a model wrote, so that reading it again in a conversation neither ends a turn nor claims a video."""
    return _CONTROL_TOKEN.sub("", text)


def _plain(text: str) -> str:
    if found := _CONTROL_TOKEN.search(text):
        raise PromptError(f"text holds the control token {found[0]!r}: remove it from {text!r}")
    return text
