"""What share of the right answer an answer meets, without a judge, where right and wrong are not all there is.

Open answers by the words they share with the right one (F1), moments of temporal grounding by their overlap in time
(IoU). With `is_correct`, the accuracy of moments is R@0.5, and the mean share mIoU.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from storm_vlm.data.answer import final_text
from storm_vlm.data.moment import overlap, parse_moment
from storm_vlm.data.row import Row

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def answer_shares(text: str, row: Row) -> dict[str, float]:
    """0 to 1, by the name of the measure; none for a question with options."""
    text = final_text(text)
    if moment := row.meta.get("moment"):
        found = parse_moment(text)
        return {"IoU": overlap(found, moment) if found else 0.0}
    return {} if row.options else {"F1": word_f1(text, row.answer)}


def word_f1(text: str, answer: str) -> float:
    """Of the words in two texts, as SQuAD counts them: small letters, no articles, no punctuation."""
    said, wanted = _words(text), _words(answer)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", plain).split()
