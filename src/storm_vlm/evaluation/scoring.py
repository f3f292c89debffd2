"""The rules that benchmarks' authors and other harnesses score with, quirks included, beside ours on the same text.

Ours is `storm_vlm.data.answer.is_correct`. These were written from what the harnesses were seen to do. None: the
rule has no verdict (it asks a judge, or drops the answer from the denominator). Where a harness guesses at random, a
hash of the example's id guesses here, so that a figure can be made again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase, punctuation
from typing import Protocol

import numpy as np

from storm_vlm.data.answer import numbers
from storm_vlm.data.moment import overlap


class Item(Protocol):
    """What a rule needs of an example: `Row` and `Record` both have it."""

    @property
    def id(self) -> str: ...
    @property
    def options(self) -> tuple[str, ...]: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Rule:
    """What a text is worth by one harness: 0 to 1, or None."""

    score: Callable[[str, Item], float | None]
    source: str  #: the file that it was seen in: repository, path, commit

    def __call__(self, text: str, item: Item) -> float | None:
        return self.score(text, item)


_QUALIFIED = ("the {}", "{}", "the correct {}", "correct {}", "the best {}", "best {}")
_PHRASES = (
    *(form.format("answer is") for form in _QUALIFIED),
    *(form.format("option is") for form in _QUALIFIED[2:]),
    *(form.format("choice is") for form in _QUALIFIED[:4]),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def letter(item: Item) -> str:
    """Of the right option."""
    return ascii_uppercase[item.options.index(item.answer)]


def _letters(item: Item) -> str:
    return ascii_uppercase[: len(item.options)]


def _stripped(text: str, marks: str) -> str:
    for mark in marks:
        text = text.strip(mark)
    return text


def videomme_lmms_eval(text: str, item: Item) -> float:
    """The best-ranked letter: at the start, at the end, after "answer is", "(C)", "C." … Later ones win a tie.

    "A man walks so the answer is C" is A, "DNA" is A, "The best answer is: C. Because A is wrong" is A.
    """
    padded = f" {_stripped(text.strip(), ',.!?;:' + chr(39) + chr(34))} "
    inner = padded.strip()
    candidates: list[tuple[int, int, str]] = []
    for choice in "ABCD":
        if inner.startswith(choice) and not inner[1:2].isalpha():
            candidates.append((10, 0, choice))
        if inner.endswith(choice) and not inner[-2:-1].isalpha():
            candidates.append((9, len(padded), choice))
        for phrase in _PHRASES:
            at = padded.lower().find(phrase)
            candidates.append((7, padded.find(choice, at + len(phrase)) if at >= 0 else -1, choice))
        for rank, form in enumerate(
            (choice, f"{choice} ", f"{choice})", f"{choice}:", f"{choice}.")
        ):
            candidates.append((rank, padded.rfind(form), choice))
        candidates.append((6, padded.rfind(f"({choice})"), choice))
    _, _, choice = max((c for c in candidates if c[1] >= 0), default=(0, -1, ""))
    return float(choice == letter(item))


def videomme_authors(text: str, item: Item) -> float | None:
    """The first capital A to D after some phrases are cut out ("Answer: C" is A); None, not counted, without one."""
    for phrase in _OPENERS:
        text = text.replace(phrase, "")
    return first_capital(text, item) if re.search("[ABCD]", text) else None


def videomme_vlmevalkit(text: str, item: Item) -> float:
    """The same with other phrases, and without one wrong: "Based on the video, C" is B."""
    for phrase in ("The best answer is", "The correct answer is", "The answer", "Answer:"):
        text = text.replace(phrase, "")
    return first_capital(text, item)


_OPENERS = ("The best answer is", "The correct answer is", "The answer is", "The answer")


def first_capital(text: str, item: Item) -> float:
    """VideoEspresso's own rule: the first capital A to D, of whatever word."""
    match = re.search("[ABCD]", text)
    return float(match is not None and match[0] == letter(item))


def mvbench_authors(text: str, item: Item) -> float:
    """The first word of the first line, behind a "(", is part of "(c)", or holds it: "C", "(C) red" and "" are right.

    "The answer is (C)" is wrong.
    """
    first = f"({text.strip().splitlines()[0] if text.strip() else ''}".lower().split(" ")[0]
    right = f"({letter(item).lower()})"
    return float(first.replace(".", "") in right or right in first)


def mvbench_vlmevalkit(text: str, item: Item) -> float:
    """VLMEvalKit's, before its judge: the first word of the text, as it is; "(" is right, too."""
    first = text.lower().strip().split(" ")[0]
    right = f"({letter(item).lower()})"
    return float(first.replace(".", "") in right or right in first)


def mvbench_lmms_eval(text: str, item: Item) -> float | None:
    """The first A to E that is a word, small or not: "It is a dog, so (C)" is A. "" is dropped."""
    if text == "":
        return None
    if stated := re.match(r"([A-E])\.\s*.+$", text.strip(), re.IGNORECASE):
        return float(stated[1].upper() == letter(item))
    text = re.sub(r"[\n\t]", " ", text).strip()
    numbers, plain = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or numbers else " ")
    match = re.search(r"\b[A-E]\b", re.sub(r"\.(?!\d)", "", plain), re.IGNORECASE)
    return float(match is not None and match[0].upper() == letter(item))


def video_holmes_authors(text: str, item: Item) -> float:
    """In the last <answer>, else in all: the first of A to F that stands as "X ", "X:" or "[X", else that occurs."""
    tagged = re.findall(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    answer = tagged[-1].strip() if tagged else text
    marked = [x for x in "ABCDEF" if any(f in answer for f in (f"{x} ", f"{x}:", f"[{x}"))]
    chosen = marked or [x for x in "ABCDEF" if x in answer]
    return float(chosen[:1] == [letter(item)])


def video_holmes_vlmevalkit(text: str, item: Item) -> float:
    """The same, but nothing without <answer>."""
    return video_holmes_authors(text if "<answer>" in text else "", item)


def video_holmes_lmms_eval(text: str, item: Item) -> float:
    """The last "(X)", else "X ", else "X.", else an option's text; else at random, as for <answer>C</answer>."""
    padded = f" {_stripped(text, ',.!?;:' + chr(39))} "
    chosen: list[tuple[int, str]] = []
    for form, counted in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if not chosen:
            kept = [x for x in _letters(item) if form.format(x) in padded]
            chosen = [(padded.rfind(counted.format(x)), x) for x in kept]
    chosen = chosen or _options_named(padded, item)
    guess = _random_letter(item) if not chosen else max(chosen, key=lambda pair: pair[0])[1]
    return float(guess == letter(item))


def _options_named(text: str, item: Item) -> list[tuple[int, str]]:
    """Where each option's text stands last in more than five words, and its letter."""
    places = [text.lower().rfind(option.lower()) for option in item.options]
    named = [(at, x) for at, x in zip(places, _letters(item), strict=True) if at >= 0]
    return named if len(text.split()) > 5 else []


def _random_letter(item: Item) -> str:
    drawn = int.from_bytes(hashlib.sha256(item.id.encode()).digest()[:8], "big")
    return _letters(item)[drawn % len(item.options)]


def tomato_authors(text: str, item: Item) -> float | None:
    """A letter alone, or "Answer is:(C)"; the rest goes to a judge."""
    text = text.strip()
    stated = re.match(r"Answer is:?\(?([A-Fa-f])\)?$", text)
    said = stated[1].upper() if stated else text.upper()
    return float(said == letter(item)) if len(said) == 1 and said in _letters(item) else None


def tomato_lmms_eval(text: str, item: Item) -> float:
    """The only capital that is an option's letter, else the last "(X)", else the first such letter; else A."""
    padded = f" {_stripped(text, ',.!?;:' + chr(39))} "
    chosen = [(padded.rfind(f"({x})"), x) for x in _letters(item) if x in padded]
    chosen = chosen or _options_named(padded, item)
    guess = max(chosen, key=lambda pair: pair[0])[1] if chosen else "A"
    return float(guess == letter(item))


def tvbench_lmms_eval(text: str, item: Item) -> float:
    """The first letter that is a word ("a" is A), else the first character, else the one option named."""
    letters, upper = _letters(item), text.strip().upper()
    word, first = re.search(r"\b[A-Z]\b", upper), re.match(r"[(\[]?([A-Z])", upper)
    answer = " ".join(text.lower().split())
    named = [
        x
        for x, o in zip(letters, item.options, strict=True)
        if " ".join(o.lower().split()) in answer
    ]
    if word and word[0] in letters:
        guess = word[0]
    elif first and first[1] in letters:
        guess = first[1]
    else:
        guess = named[0] if len(named) == 1 else ""
    return float(guess == letter(item))


def mmvu_lmms_eval(text: str, item: Item) -> float | None:
    """Options: the right letter anywhere as a word, or the option's text. Open: one is part of the other.

    Gold A, "It is a cat, answer C" is right; open, "" and "o" and "not a Dolly Zoom" are right. An open answer
    that no rule takes goes to a judge: None.
    """
    answer = text.strip().lower()
    if item.options:
        gold = letter(item).lower()
        words = [
            w for w in (w.strip(punctuation) for w in item.answer.lower().split()) if len(w) > 2
        ]
        named = gold in answer and any(word in answer for word in words)
        as_word = re.search(rf"\b{gold}\b", answer) is not None
        return float(as_word or item.answer.strip().lower() in answer or named)
    answer, right = _plain_powers(answer), _plain_powers(item.answer.strip().lower())
    if answer in right or right in answer:
        return 1.0
    ours, theirs = re.findall(r"\d+\.?\d*", answer), re.findall(r"\d+\.?\d*", right)
    if ours and theirs and abs(float(ours[0]) - float(theirs[0])) < 0.01:
        return 1.0
    words, wanted = _words(answer), _words(right)
    if 2 <= len(wanted) <= 5 and all(word in words for word in wanted if len(word) > 2):
        return 1.0
    order, right_order = (re.search(r"o\s*\([^)]+\)", part) for part in (answer, right))
    return 1.0 if order and right_order and order[0] == right_order[0] else None


def _plain_powers(text: str) -> str:
    powers = {power: f"^{digit}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    return " ".join(text.translate(str.maketrans(powers)).split())


def _words(text: str) -> list[str]:
    return [word for word in (word.strip(punctuation) for word in text.split()) if word]


def tempcompass(text: str, task: str, published: str, options: Sequence[str]) -> float | None:
    """TempCompass's own matching before its judge; `published` is the answer, `options` are the lines, as published.

    "Not sure", "None of these" and "Now the man" are "no"; `<answer>yes</answer>`, "(2)" and "The best option is
    Option 2" match nothing.
    """
    if task == "yes_no":
        answer = next((word for word in ("yes", "no") if text.lower().startswith(word)), None)
        return None if answer is None else float(answer == published)
    if task == "multi-choice":
        if text == published:
            return 1.0
        named = re.fullmatch(r"([ABCD])(?:[.)].*)?", text, re.DOTALL)
        return float(named[1] == published[0]) if named else None
    if task == "caption_matching":
        return _caption_match(text, published, options)
    return None


def _caption_match(text: str, published: str, options: Sequence[str]) -> float | None:
    answer = None
    for label, _, sentence in (option.partition(": ") for option in options):
        after_bracket = text.split(") ")[1] if ") " in text else None
        if text == f"{label}: {sentence}" or sentence in (text, after_bracket):
            answer = label
        if {text, text.replace(".", "")} & {label, label.split(" ")[-1]}:
            answer = label
    return None if answer is None else float(answer == published.partition(":")[0])


def vsi_choice(text: str, item: Item) -> float:
    """VSI-Bench, options: the first word is the letter, in either case ("c. red"); "(C)" is wrong."""
    return float(text.split(" ")[0].rstrip(".").strip().lower() == letter(item).lower())


def vsi_authors(text: str, item: Item) -> float:
    """Options: see `vsi_choice`. Numbers: the first word, if it is one ("4 chairs"; "about 4" is 0)."""
    if item.options:
        return vsi_choice(text, item)
    try:
        return relative_accuracy(float(text.split(" ")[0].rstrip(".").strip()), item)
    except ValueError:
        return 0.0


def vsi_lmms_eval(text: str, item: Item) -> float:
    """The same, but the first number of a text, in digits or words ("about four")."""
    if item.options:
        return vsi_choice(text, item)
    found = numbers(text)
    return relative_accuracy(found[0], item) if found else 0.0


def relative_accuracy(number: float, item: Item) -> float:
    """Mean relative accuracy: the share of ten tolerances (50% to 5%) that is kept."""
    if (right := float(item.answer)) == 0:
        return 0.0
    return float((abs(number - right) / right <= 1 - np.linspace(0.5, 0.95, 10)).mean())


def futurebench(text: str, item: Item) -> float:
    """FutureBench's own rule: the first capital A to D after some phrases, four of which miss the comma between."""
    joined = ("The best option isThe correct option is", "Best answer:Best option:")
    return _first_letter(text, item, (*_OPENERS, *joined), "[ABCD]")


def videomme_v2(text: str, item: Item) -> float:
    """Video-MME-v2's own rule: the first capital A to H after some phrases."""
    ends = ("Final Answer:", "Best answer:", "Best option:", "Answer:", "Option:")
    options = ("The best option is", "The correct option is")
    return _first_letter(text, item, (*_OPENERS, *options, *ends), "[A-H]")


def _first_letter(text: str, item: Item, phrases: Sequence[str], letters: str) -> float:
    for phrase in phrases:
        text = text.replace(phrase, "")
    match = re.search(letters, text)
    return float(match is not None and match[0] == letter(item))


def lvbench(text: str, item: Item) -> float:
    """LVBench's own rule: the first character of what follows the first "(", or of the text."""
    answer = text.strip().split(")")[0].strip()
    answer = answer.split("(")[1].strip() if "(" in answer else answer
    return float(answer[:1] == letter(item))


_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?"
_STRETCHES = (
    rf"\b({_CLOCK})\s*[\u2013-]\s*({_CLOCK})\b",
    r"(\d+(?:\.\d+)?)\s*[\u2013-]\s*(\d+(?:\.\d+)?)",
)


def charades_lmms_eval(text: str, item: Item) -> float:
    """IoU of the first stretch in a sentence about a start, an end or what happens; where none is, in any.

    A stretch is "a - b" or "a to b", else two clock times, else the first numbers of two such sentences. One that
    runs backwards is turned round.
    """
    told = text.lower().replace("a specific example is : 20.8 - 30.0 seconds", "")
    sentences = re.split(r"[!?\n]", told.replace("to", "-"))
    sentences = [s for s in sentences if re.search("start|end|happen", s)] or sentences
    times: list[str] = []
    for pattern in _STRETCHES:
        found = next((m for s in sentences if (m := re.search(pattern, s))), None)
        times = times or list(found.groups() if found else ())
    times = times or [time for s in sentences for time in re.findall(rf"\b{_CLOCK}\b", s)]
    if len(times) < 2:
        firsts = (re.search(r"\b\d+(?:\.\d+)?\b", s) for s in sentences)
        times = [first[0] for first in firsts if first]
    if len(times) < 2:
        found = (
            re.search(r"(\d+(?:\.\d+)?)\s*s\s*[\u2013-]\s*(\d+(?:\.\d+)?)", s) for s in sentences
        )
        times = next((list(match.groups()) for match in found if match), [])
    if not times:
        return 0.0
    start, end = sorted(map(_clock_seconds, times[:2]))
    gold = item.answer.split(" - ")
    return overlap((start, end), (float(gold[0]), float(gold[1])))


def _clock_seconds(time: str) -> float:
    seconds = 0.0
    for part in time.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _of(repository: str, path: str, commit: str) -> str:
    return f"github.com/{repository}: {path} at {commit}"


def _lmms(task: str, score: Callable[[str, Item], float | None]) -> dict[str, Rule]:
    path = f"lmms_eval/tasks/{task}/utils.py"
    return {"lmms-eval": Rule(score, f"lmms-eval 0.7.3: {path}")}


def _vlm(path: str, score: Callable[[str, Item], float | None]) -> dict[str, Rule]:
    return {"VLMEvalKit": Rule(score, _of("open-compass/VLMEvalKit", path, "e8e78f0"))}


def _authors(
    score: Callable[[str, Item], float | None], repository: str, path: str, commit: str
) -> dict[str, Rule]:
    return {"authors": Rule(score, _of(repository, path, commit))}


def _unscored(text: str, item: Item) -> None:
    """Its authors ask a judge about every answer; or `Benchmark.official_score` looks at more than an `Item` has."""


_MVBENCH = _authors(
    mvbench_authors, "OpenGVLab/Ask-Anything", "video_chat2/mvbench.ipynb", "4dd8210"
)
_VSI = _authors(
    vsi_authors, "vision-x-nyu/thinking-in-space", "lmms_eval/tasks/vsibench/utils.py", "51e089c"
) | _lmms("vsibench", vsi_lmms_eval)
_TEMPCOMPASS = _authors(_unscored, "llyx97/TempCompass", "eval_*.py", "e1b4631")
#: By benchmark and by whose rule it is, the authors' first. The first is the official one.
RULES: dict[str, dict[str, Rule]] = {
    "videomme": _authors(
        videomme_authors, "BradyFU/Video-MME", "evaluation/eval_your_results.py", "49a2e67^"
    )
    | _lmms("videomme", videomme_lmms_eval)
    | _vlm("vlmeval/dataset/videomme.py", videomme_vlmevalkit),
    "mvbench": _MVBENCH
    | _lmms("mvbench", mvbench_lmms_eval)
    | _vlm("vlmeval/dataset/MVBench.py", mvbench_vlmevalkit),
    "tvbench": _authors(mvbench_authors, "daniel-cores/tvbench", "infer.ipynb", "c354322")
    | _lmms("tvbench", tvbench_lmms_eval),
    "tempcompass": _TEMPCOMPASS,
    "tempcompass_captioning": _TEMPCOMPASS,
    "videoespresso": _authors(first_capital, "hshjerry/VideoEspresso", "eval/score.py", "c865570"),
    "video_holmes": _authors(
        video_holmes_authors, "TencentARC/Video-Holmes", "evaluate.py", "52ef8da"
    )
    | _lmms("video_holmes", video_holmes_lmms_eval)
    | _vlm("vlmeval/dataset/video_holmes.py", video_holmes_vlmevalkit),
    "mmvu": _lmms("mmvu", mmvu_lmms_eval),  # its authors ask GPT-4o about every answer
    "mmvu_open": _lmms("mmvu", mmvu_lmms_eval),
    "tomato": _authors(tomato_authors, "yale-nlp/TOMATO", "src/parse_result.py", "fe2025f")
    | _lmms("tomato", tomato_lmms_eval),
    "vsibench": _VSI,
    "vsibench_debiased": _VSI,
    "vsibench_pruned": _VSI,
    "futurebench": {"authors": Rule(futurebench, "github.com/sail-sg/Video-Next-Event-Prediction")},
    "twiffbench": _authors(
        _unscored, "LiuJunhua02/TwiFF", "eval/TwiFFBench/gencot_vqa_eval.py", "782caef"
    ),
    "videomme_v2": _lmms("videomme_v2", videomme_v2),
    "lvbench": {"authors": Rule(lvbench, "github.com/zai-org/LVBench")}
    | _lmms("lvbench", videomme_lmms_eval),
    "charades_sta": _lmms("charades_sta", charades_lmms_eval),
}
