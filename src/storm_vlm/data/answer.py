"""From the text that a model writes to its answer, read as a careful person would.

What is no answer goes first: thoughts, mark-up, all but the last `<answer>` or `\\boxed`. Then each name of an option
(its letter, a benchmark's label of it, its own words) becomes one character of the private area of Unicode, and what
is denied becomes another. What chooses is then a short pattern over such text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from string import ascii_uppercase

from storm_vlm.data.moment import RIGHT, overlap, parse_moment
from storm_vlm.data.row import Row

_THOUGHT = re.compile(r"</think(?:ing)?>|◁/think▷|\[/THINK\]", re.IGNORECASE)
_THINKS = re.compile(r"<think(?:ing)?>|◁think▷|\[THINK\]", re.IGNORECASE)
_FINAL = (
    re.compile(
        r".*(?:<answer>|<\|begin_of_box\|>)(.*?)(?:</answer>|<\|end_of_box\|>|\Z)", re.DOTALL
    ),
    re.compile(r".*\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}?", re.DOTALL),
)
_LATEX = re.compile(r"\\(?:text|math)\w*\s*\{([^{}]*)\}|\\[()\[\]]")
_MARKUP = re.compile(
    r"[*`#$_~\u200b-\u200f\ufeff]+|</?[a-z]+>|^[ \t]*(?:>|[-•]\s)[ \t]*", re.M | re.I
)
_RUNS = re.compile(r"(\n)\s*|([^\w\n])\2+")  # of white space, or of a mark
_PLAIN_MARKS = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")

# Names of option i: explicit (0xE000 + i), its own words (0xE100 + i), a bare letter (0xE200 + i); what is denied.
_NAMED, _WORDS, _BARE, _DENIED = 0xE000, 0xE100, 0xE200, "\ue300"
_N, _W, _B = "[\ue000-\ue01f]", "[\ue100-\ue11f]", "[\ue200-\ue21f]"
_LETTER, _ANY, _NAME = "[\ue000-\ue01f\ue200-\ue21f]", "[\ue000-\ue21f]", "[\ue000-\ue3ff]"
_GAP = r"[^\w\ue000-\ue3ff]*"  # marks and white space
_EDGE, _END = r"(?<![A-Za-z0-9'.\-])", r"(?![A-Za-z0-9'\-])"
_NOUN = r"(?:options?|choices?|answers?|letters?|captions?|sentences?|descriptions?|选项|選項)"
_AND = (
    r"\s*(?:,|/|&|、|\bor\b|\band\b|\bnor\b|和|或)\s*"
    r"(?:(?:or|and|nor|just|simply|maybe|perhaps|possibly)\s+)*"
)

# A denial is said of the rest of its clause, and of a list that begins there; or of what is said to be wrong.
_BEFORE = re.compile(
    r"(?:\b(?:not|never|nor|neither|without(?! (?:a )?doubt)|cannot|no (?:evidence|indication|sign)s?"
    r"|unlike|except|(?:rather|other) than|instead of|as opposed to|eliminat\w+|exclud\w+"
    r"|rul(?:es?|ed|ing) out|reject\w*|discard\w*|dismiss\w*|contradict\w*)\b|n't\b|不是|不选|并非|排除)"
    r"(?:(?!\b(?:but|because|while|whereas|so|therefore)\b)[^.;:!?\n,。]"
    rf"|{_AND}(?={_NAME}(?!\W*(?:is|are|was|were|does)\b)))*",
    re.I,
)
_AFTER = re.compile(
    rf"{_ANY}(?:{_AND}{_ANY}){{0,9}}+(?=[^\w\n.,;\ue000-\ue3ff]{{0,4}}"
    r"(?:(?:is|are|was|were|be|been|being|seems?|does|do|did|has|have|can|could|would|should|must|may"
    r"|might|also|both|clearly|simply|therefore|ca|wo)\b\s*)*"
    r"(?:not\b|n't\b|never\b|cannot\b|incorrect|wrong|false\b|inaccurate|ruled out|eliminated|excluded"
    r"|impossible|unlikely|less\b|out\b|\?|不对|不正确|不是|错))",
    re.I,
)
_IS = (
    r"(?:\b(?:is|was|are|(?:would|should|must|will|could|has to) be|remains)\b|'s\b|[:=]"
    r"|是|为|為|は|은|는|이)"
)
_SURE = (
    r"(?:(?:most|likely|probably|definitely|clearly|indeed|thus|therefore|simply|that it is|that|the|best"
    rf"|correct|right)\b{_GAP})*(?:{_NOUN}{_GAP})?"
)
_CLAIM = re.compile(
    r"\b(?:answer|option|choice|caption|sentence|description|selection|conclusion|match)\b[\"']?"
    r"(?:\s(?:that|which|to|for|of|here|in|given|from)\b[^.:;!?\n]{0,80}?)?"
    rf"\s*{_IS}{_GAP}{_SURE}({_ANY})"
    rf"|\b(?:answer|choice)\b{_GAP}({_LETTER})"
    r"|\b(?:choose|chose|select|selected|pick|picked|go(?:ing)? (?:with|for)|opt for|(?:would|'d) say)\b"
    rf"{_GAP}{_SURE}({_ANY})"
    rf"|({_ANY})[^\w\ue000-\ue3ff]{{0,3}}(?:is|would be|should be|must be|seems|looks)\s+"
    r"(?:(?:the|a|most|more|likely|definitely|clearly)\s+)*"
    r"(?:correct|right|best|better|accurate|true|answer|suitable|appropriate|choice)"
    rf"|(?:答案|正解|答え|정답|选择|選擇|选|選){_GAP}(?:应该)?{_IS}*{_GAP}(?:{_NOUN}{_GAP})?({_ANY})",
    re.I,
)
_IF = re.compile(r"\b(?:if|whether|suppose|assum\w+)\b[^.,;:!?\n]*\Z", re.I)
_HEAD = re.compile(
    rf"{_GAP}(?:({_N})|({_B})(?=\s*(?:\n|$)|[.):,;!。、]|\s+(?:-\s|since\b|because\b))"
    rf"|({_W})[)\]\"']*(?=\s*(?:\n|$|[.,:;!。])|\s*-\s"
    r"|\s(?i:the|he|she|it|they|there|this|that|these|those|i|we)\b))"
)
_LAST = re.compile(
    rf"(?<!{_NAME})(?:[,:\n]|\b(?:so|thus|hence|therefore)\b){_GAP}({_LETTER}){_GAP}\Z"
)
_ITEM = re.compile(rf"^\s*({_ANY})(?=\s*(?:$|[.):,]))", re.M)
_DOUBT = re.compile(
    r"\b(?:whether|questions?|asks?|asked|unclear|cannot|can't|unable|(?:im|not )possible|if|might|may"
    r"|sure|options?|or|no)\b",
    re.I,
)
_THEN = re.compile(r"\W*(?:so|therefore|thus|hence|in conclusion|overall|in summary)\b", re.I)
_LETTERS = [
    (kind, re.compile(pattern, re.M))
    for kind, pattern in (
        (_NAMED, r"(?<!\w)[(\[{<\"'「『【]\s*([A-Z]|\d+)\s*[)\]}>\"'」』】]"),
        (_NAMED, r"(?<!\w)\(([a-z])\)"),
        (_NAMED, rf"{_EDGE}([A-Z])(?=\)(?!\w))"),
        (_NAMED, rf"^[^\w\n]*([A-Z]|\d+)(?=[.):](?!\S)|[.):]{_NAME}|。)"),
        (
            _NAMED,
            rf"(?i:\b(?:options?|choices?|letter|action)\b|选项|選項)\W{{0,3}}([A-Z]|\d+){_END}",
        ),
        (_NAMED, rf"(?:\b(?:is|be)\b|'s\b){_GAP}([A-Z])(?={_GAP}(?:\Z|[.,;!\n]|because\b))"),
        (_NAMED, rf"{_N}{_AND}([A-Z]|\d+){_END}"),
        (_BARE, r"\A\W*([a-z]|\d+)(?=[.):](?!\S)|\W*\Z|\s*\n)"),
        (
            _NAMED,
            r"(?i:answer|option|choice)\W*(?i:(?:is|would be)\b\W*)?([a-z])(?=[\"')\]}]*[.,;]?\s*(?:\n|\Z))",
        ),
        (_BARE, rf"{_EDGE}([B-HJ-Z]){_END}"),
        (  # "A" and "I" are words, too
            _BARE,
            rf"{_EDGE}([AI]){_END}(?=\W*(?:\n|\Z)|[.):,;!?\]\"。、]"
            r"|\s(?:is|because|since|as|and|or)\b|\s-\s|[\u3000-\u9fff\uac00-\ud7ff])",
        ),
    )
]
_WITH_WORDS = re.compile(rf"({_LETTER})([\s).:\]\-,\"'(]{{0,4}})({_W})")
_NTH = ("first", "second", "third", "fourth", "fifth", "sixth")
_COMMON = re.compile(
    r"an?|the|of|and|or|is|are|was|be|being|its?|they|he|she|this|that|then|all|both|none|one|two|three"
    r"|four|five|each|other|above|below",
    re.I,
)
_POLAR = {"yes", "no", "true", "false"}


def final_text(text: str) -> str:
    """What a model says in the end, without mark-up: after its thoughts, in its last `<answer>` or `\\boxed`.

    "" for a chain of thought that was cut off.
    """
    text = _THOUGHT.split(_normal(text))[-1]
    if _THINKS.search(text):
        return ""
    for last in _FINAL:
        if found := last.match(text):
            text = found[1]
    text = _MARKUP.sub("", _LATEX.sub(r"\1", text))
    return _RUNS.sub(lambda run: run[1] or run[2], text).strip()


def parse_answer(text: str, options: Sequence[str], labels: Sequence[str] = ()) -> int | None:
    """The index of the option that ``text`` chooses, None if it does not clearly choose one.

    The last choice that is stated ("the answer is C", "I choose C", "C is correct") counts; else the one that the
    text starts with, or ends with; else the only one that is named ("option C", "(C)"); else the only one whose words
    the first sentence, or one that concludes, has in it. A denied option is none, nor are several, a list of them, a
    letter without an option, or thoughts. `labels`: a benchmark's own, as "Caption 2".
    """
    text = _marked(final_text(text), options, labels)
    stated = [m for m in _CLAIM.finditer(text) if not _IF.search(text, 0, m.start())]
    for found in (stated[-1] if stated else None, _HEAD.match(text), _LAST.search(text)):
        if found and (group := found.lastindex):
            chosen, rest = _index(found[group]), text[found.end(group) :]
            others = re.match(rf"{_AND}(?:{_NOUN}\s*)?({_ANY})", rest, re.I)
            several = others is not None and _index(others[1]) != chosen
            listed = not stated and len(_indices(_ITEM, text)) > 1
            return None if several or listed else chosen
    if named := _indices(re.compile(f"({_N})"), text):
        return named.pop() if len(named) == 1 else None
    if {option.casefold().strip(" .") for option in options} & _POLAR:
        return None
    first, *others = re.split(r"(?<=[.!?。])\s+|\n+", text)
    for sentence in (first, *filter(_THEN.match, reversed(others))):
        said = _indices(re.compile(f"({_W})"), sentence) or _alluded(sentence, options)
        if len(said) == 1 and not _DOUBT.search(sentence):
            return said.pop()
    return None


def _index(name: str) -> int:
    return ord(name) & 0xFF


def _indices(pattern: re.Pattern[str], text: str) -> set[int]:
    return {_index(name) for name in pattern.findall(text)}


def _alluded(sentence: str, options: Sequence[str]) -> set[int]:
    """Of options that are not there word for word: the one all of whose words are, if no other's own word is."""
    if _BEFORE.search(sentence) or _DENIED in sentence:
        return set()
    words = [{_form(w) for w in _words(o) if not _COMMON.fullmatch(w)} for o in options]
    said = [{w for w in mine if re.search(_bounded(w), sentence, re.I)} for mine in words]
    own = [some - set().union(*words[:i], *words[i + 1 :]) for i, some in enumerate(said)]
    whole = {i for i, mine in enumerate(words) if said[i] == mine and own[i]}
    return whole if sum(map(bool, own)) == 1 else set()


def _marked(text: str, options: Sequence[str], labels: Sequence[str]) -> str:
    """The text with each option's names as characters, and those that are denied as `_DENIED`."""
    index_of = {letter: index for index, letter in enumerate(ascii_uppercase[: len(options)])}
    index_of |= {label.split()[-1].upper(): index for index, label in enumerate(labels)}
    spoken = [(_WORDS + index, _pattern(option)) for index, option in enumerate(options)]
    spoken += [(_NAMED + index, _pattern(label)) for index, label in enumerate(labels)]
    spoken += [(_NAMED + i, rf"\b{nth} {_NOUN}\b") for i, nth in enumerate(_NTH[: len(options)])]
    for name, pattern in sorted(spoken, key=lambda pair: -len(pair[1])):
        if pattern and [other for _, other in spoken].count(pattern) == 1:
            text = re.sub(pattern, chr(name), text, flags=re.I)
    for kind, pattern in _LETTERS:
        text = pattern.sub(partial(_name, kind, index_of), text)
    text = _WITH_WORDS.sub(_united, text)
    for denied in (_BEFORE, _AFTER):
        text = denied.sub(lambda match: re.sub(_ANY, _DENIED, match[0]), text)
    return text


def _name(kind: int, index_of: dict[str, int], match: re.Match[str]) -> str:
    if (index := index_of.get(match[1].upper())) is None:
        return match[0]
    start, end = (place - match.start() for place in match.span(1))
    return match[0][:start] + chr(kind + index) + match[0][end:]


def _united(match: re.Match[str]) -> str:
    """A letter or label and an option's words: one name if they agree, none if they contradict each other."""
    first, between, last = match.groups()
    if _index(first) == _index(last):
        return chr(_NAMED + _index(first))
    return match[0] if "\n" in between else _DENIED


def _words(text: str) -> list[str]:
    return [word for part in _normal(text).split() if (word := part.strip(".,;:!?\"'()"))]


def _form(word: str) -> str:
    """A pattern of the word, inflected."""
    stem = re.fullmatch(r"([a-z]{3,}?)(?:ing|es|ed|s|e|ly)?", word.lower())
    return f"{stem[1]}(?:e|es|s|ed|ing|ly)?" if stem else re.escape(word.lower())


def _bounded(pattern: str) -> str:
    return rf"(?<!\w)(?<!\w-){pattern}(?!-?\w)"


def _pattern(words: str) -> str:
    """Of these words in a text: in any case, inflected, with or without an article; "" for a letter or for none."""
    parts = _words(words)
    if len(parts) > 1 and re.fullmatch("an?|the", parts[0], re.I):
        parts = parts[1:]
    if not parts or re.fullmatch("[A-Za-z]", "".join(parts)):
        return ""
    pattern = r"(?:(?:an?|the)\s+)?" + r"[.,;:!?\"'()]*\s[\"'(]*".join(map(_form, parts))
    if "".join(parts).isdecimal():
        return rf"(?<![\w.,:/\-]){pattern}(?![\w:/%]|[.,]\d)"
    return _bounded(pattern)


_TABLE = """0 zero 1 one 2 two 3 three 4 four 5 five 6 six 7 seven 8 eight 9 nine 10 ten 11 eleven 12 twelve
13 thirteen 14 fourteen 15 fifteen 16 sixteen 17 seventeen 18 eighteen 19 nineteen 20 twenty 30 thirty 40 forty
50 fifty 60 sixty 70 seventy 80 eighty 90 ninety 100 hundred 1000 thousand"""
_VALUES = {word: int(value) for value, word in re.findall(r"(\d+) (\w+)", _TABLE)}
_SPELLED = rf"(?:{'|'.join(sorted(_VALUES, key=len, reverse=True))})"
_NUMBER = re.compile(rf"-?\d+(?:\.\d+)?|\b{_SPELLED}\b(?:[^a-z\d]+(?:and[^a-z\d]+)*{_SPELLED}\b)*")
_LEAD = re.compile(
    r"\A(?:(?:the )?(?:final |correct )?answer(?: is)?\s*:?|it is|it's|an?|the)\s+(?=\S)"
)


def numbers(text: str) -> list[float]:
    """All numbers in a text, in digits ("2.5") or words ("two hundred and fifty"), in their order."""
    found = _NUMBER.findall(text.lower())
    return [float(said) if said[-1].isdigit() else _spelled(said) for said in found]


def _spelled(said: str) -> float:
    total = current = 0
    for word in re.findall(_SPELLED, said):
        value = _VALUES[word]
        if value < 100:
            current += value
        elif value == 100:
            current = max(current, 1) * value
        else:
            total, current = total + max(current, 1) * value, 0
    return float(total + current)


def is_correct(text: str, row: Row) -> bool | None:
    """Whether ``text`` answers the row; None if it cannot be parsed (which counts as wrong).

    Free-text answers must be equal up to case, white space, an article, "the answer is" and a final period. One that
    is a number must be the only number in the text: "4.0", "four" and "4 chairs" are 4. ``meta["labels"]`` holds a
    benchmark's own labels of the options, if it has any; ``meta["moment"]`` the start and end, in seconds of what is
    shown, that a question of temporal grounding asks for: the answer must meet them by half.
    """
    if row.options:
        index = parse_answer(text, row.options, row.meta.get("labels", ()))
        return None if index is None else row.options[index] == row.answer
    if moment := row.meta.get("moment"):
        found = parse_moment(final_text(text))
        return None if found is None else overlap(found, moment) >= RIGHT
    said, right = (_plain(part) for part in (final_text(text), row.answer))
    if not said or said == right:
        return bool(said) or None
    if " " in right or not _NUMBER.fullmatch(right):
        return False
    if _BEFORE.search(said) or re.search(r"\bno\b", said):
        return False
    said = re.sub(r"(?<=\d),(?=\d{3}\b)|\d+(?:st|nd|rd|th)\b", "", said)
    return set(numbers(said)) == set(numbers(right))


def _plain(text: str) -> str:
    text = " ".join(_normal(text).casefold().split()).strip("\"' ")
    while (shorter := _LEAD.sub("", text.removesuffix(".").rstrip())) != text:
        text = shorter
    return text


def _normal(text: str) -> str:
    """With plain letters, digits, brackets, quotes and dashes."""
    return unicodedata.normalize("NFKC", text).translate(_PLAIN_MARKS)
