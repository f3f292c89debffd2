"""Other harnesses' rules, by the quirks that they were seen to have; None: no verdict."""

import pytest

from storm_vlm.data.prompt import is_correct
from storm_vlm.data.row import Row
from storm_vlm.evaluation.scoring import RULES

LETTERS = "ABCDEF"


def row(gold: str, options: int = 4, id: str = "1", texts: tuple[str, ...] = ()) -> Row:
    texts = texts or tuple(f"option text {i}" for i in range(options))
    answer = texts[LETTERS.index(gold)]
    return Row(id=id, video="v.mp4", question="Q?", options=texts, answer=answer, split="test")


@pytest.mark.parametrize(
    ("rule", "text", "taken"),
    [
        ("videomme/lmms-eval", "C", "C"),
        ("videomme/lmms-eval", "C.", "C"),
        ("videomme/lmms-eval", "(C) Berries", "C"),
        ("videomme/lmms-eval", "The best answer is: C. Because A is wrong", "A"),
        ("videomme/lmms-eval", "A man walks so the answer is C", "A"),
        ("videomme/lmms-eval", "DNA", "A"),
        ("videomme/lmms-eval", "Based on the video, C", "C"),
        ("videomme/lmms-eval", "I think (B) or (C) fits", "C"),
        ("videomme/lmms-eval", "", ""),
        ("videomme/VLMEvalKit", "Based on the video, C", "B"),
        ("videomme/VLMEvalKit", "Best answer: C", "B"),
        ("videomme/VLMEvalKit", "The best answer is: C. Because A is wrong", "C"),
        ("videomme/VLMEvalKit", "Answer: D", "D"),
        ("videomme/VLMEvalKit", "none", ""),
        ("mvbench/original", "C", "C"),
        ("mvbench/original", "(c) red", "C"),
        ("mvbench/original", "C. red", "C"),
        ("mvbench/original", "The answer is (C)", ""),
        ("mvbench/lmms-eval", "C. red", "C"),
        ("mvbench/lmms-eval", "It is a dog, so (C)", "A"),
        ("mvbench/lmms-eval", "The answer is (C)", "C"),
        ("mvbench/lmms-eval", "<answer>C</answer>", "C"),
        ("mvbench/lmms-eval", "no idea", ""),
        ("tvbench/lmms-eval", "a dog, so C", "A"),
        ("tvbench/lmms-eval", "Based on it", "B"),
        ("tvbench/lmms-eval", "It is option text 2", "C"),
        ("videoespresso/original", "Based on the video, C", "B"),
        ("videoespresso/original", "(C)", "C"),
        ("videoespresso/original", "c", ""),
        ("video_holmes/original", "<think>A</think><answer>C</answer>", "C"),
        ("video_holmes/original", "<answer>C</answer> then <answer>D: Late</answer>", "D"),
        ("video_holmes/original", "<answer>Because: C</answer>", "B"),
        ("video_holmes/original", "<answer>Back, so [C]</answer>", "C"),
        ("video_holmes/original", "C", ""),
        ("video_holmes/lmms-eval", "(B) and then (C)", "C"),
        ("video_holmes/lmms-eval", "C", "C"),
        ("video_holmes/lmms-eval", "I would say that option text 3 it is", "D"),
        ("tomato/lmms-eval", "it is so hard to say", "A"),
        ("tomato/lmms-eval", "Based on the video, C", "B"),
        ("tomato/lmms-eval", "Based on it, (C)", "C"),
    ],
)
def test_the_letter_that_a_rule_takes(rule, text, taken) -> None:
    benchmark, name = rule.split("/")
    score = RULES[benchmark][name]
    assert [x for x in LETTERS[:4] if score(text, row(x))] == list(taken)


def test_an_empty_answer_is_right_or_not_counted_by_mvbenchs_rules() -> None:
    rules = RULES["mvbench"]
    for gold in LETTERS[:4]:
        assert rules["original"]("", row(gold)) == rules["original"]("(", row(gold)) == 1
        assert rules["lmms-eval"]("", row(gold)) is None
        assert is_correct("", row(gold)) is None


def test_video_holmes_guesses_but_the_same_each_time() -> None:
    rule = RULES["video_holmes"]["lmms-eval"]
    for text in ("<answer>C</answer>", ""):
        hits = [rule(text, row("C", 6, str(i))) for i in range(600)]
        assert hits == [rule(text, row("C", 6, str(i))) for i in range(600)]
        assert 0.12 < sum(hits) / 600 < 0.22  # a sixth is free
    assert is_correct("<answer>C</answer>", row("C", 6)) is True


def test_mmvu_takes_a_letter_anywhere() -> None:
    rule = RULES["mmvu"]["lmms-eval"]
    texts = ("plane", "train", "ship")
    assert rule("It is a cat, answer C", row("A", texts=texts)) == 1
    assert rule("It is a cat, answer C", row("C", texts=texts)) == 1
    shared = ("option one", "option two")  # one word of the right option is enough, with its letter
    assert rule("It is option two, I say", row("A", texts=shared)) == 1
    assert rule("B", row("A", texts=texts)) == 0 and rule("", row("A", texts=texts)) == 0
    assert is_correct("It is a cat, answer: C", row("A", texts=texts)) is False


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("Dolly Zoom", "", 1),
        ("Dolly Zoom", "o", 1),
        ("Dolly Zoom", "zoom", 1),
        ("Dolly Zoom", "not a Dolly Zoom", 1),
        ("Dolly Zoom", "zoom by dolly", 1),
        ("Dolly Zoom", "a pan", None),
        ("O(n²)", "it is o(n^2)", 1),
        ("12.5 m/s", "about 12.5", 1),
        ("12.5 m/s", "about 13 m", None),
    ],
)
def test_mmvu_open_answers(answer, text, score) -> None:
    asked = Row(id="1", video="v.mp4", question="Q?", answer=answer, split="test")
    assert RULES["mmvu_open"]["lmms-eval"](text, asked) == score
    assert not is_correct(text, asked)


@pytest.mark.parametrize("text", ["C", "(C)", "C.", "C. option text 2"])
def test_plain_answers_are_right_by_most_rules_and_by_ours(text) -> None:
    """What a model that obeys says is not where the rules differ; those that want tags want tags."""
    assert is_correct(text, row("C"))
    for name in ("videomme", "mvbench", "tvbench", "videoespresso", "mmvu", "tomato"):
        assert all(rule(text, row("C")) == 1 for rule in RULES[name].values()), name
