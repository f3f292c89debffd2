import pytest
from tiny import tiny_processor

from storm_vlm.data.prompt import (
    LATENT_MODES,
    answer_text,
    build_messages,
    is_correct,
    option_letter,
    parse_answer,
    render_prompt,
)
from storm_vlm.data.row import Row

COLOURS = ("red", "green", "blue", "black")


def row(answer: str, options: tuple[str, ...] = ()) -> Row:
    return Row(
        id="1", video="a.mp4", question="Which?", options=options, answer=answer, split="test"
    )


def test_the_prompt_is_the_models_own_chat_format():
    messages = build_messages(" Which colour? ", COLOURS[:2])
    assert render_prompt(tiny_processor(), messages, "off") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "Which colour?\nA. red\nB. green\nAnswer with the option's letter.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_free_text_questions_get_no_instruction_and_videos_are_counted():
    assert build_messages("Why?", num_videos=2) == [
        {
            "role": "user",
            "content": [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "Why?"}],
        }
    ]
    assert build_messages("Why?", num_videos=0)[0]["content"] == [{"type": "text", "text": "Why?"}]


def test_only_force_opens_the_latent_segment():
    processor, messages = tiny_processor(), build_messages("Why?")
    prompts = {mode: render_prompt(processor, messages, mode) for mode in LATENT_MODES}
    assert prompts["auto"] == prompts["off"]
    assert prompts["force"] == prompts["off"] + "<|latent_start|>"
    start = processor.tokenizer.convert_tokens_to_ids("<|latent_start|>")
    assert processor.tokenizer(prompts["force"])["input_ids"][-1] == start
    with pytest.raises(ValueError, match="latent_mode must be one of"):
        render_prompt(processor, messages, "forced")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|video_pad|>", "<|latent_start|>"])
def test_control_tokens_in_the_text_are_refused(token):
    with pytest.raises(ValueError, match="control token"):
        build_messages(f"Why? {token}")
    with pytest.raises(ValueError, match="control token"):
        build_messages("Why?", ["a", token])
    with pytest.raises(ValueError, match="control token"):
        answer_text(row(f"yes{token}"))
    build_messages("is 1 <|2 or a|> b?")


def test_answer_text_is_the_letter_or_the_answer():
    assert answer_text(row("blue", COLOURS)) == "C"
    assert answer_text(row(" a small dog ")) == "a small dog"
    assert [option_letter(i) for i in (0, 3, 25)] == ["A", "D", "Z"]
    for index in (-1, 26):
        with pytest.raises(ValueError, match="at most 26"):
            option_letter(index)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        # the last <answer> decides, whatever stands elsewhere
        ("<answer>C</answer>", 2),
        ("<think>A?</think><answer>B</answer> no, <answer> (C) </answer> A", 2),
        ("<answer>D", 3),
        ("B <answer>azure</answer>", None),
        ("<answer></answer>B", None),
        ("<answer>The answer is B.</answer>", 1),
        # a letter that stands alone at the start
        ("C", 2),
        (" c\n", 2),
        ("(B)", 1),
        ("(B) green", 1),
        ("B. green", 1),
        ("B) green", 1),
        ("B: green, not A", 1),
        ("**D**", 3),
        ("D\nBecause A is wrong.", 3),
        ("E", None),
        # a stated choice
        ("The answer is C.", 2),
        ("The best answer is: C. Because A is wrong", 2),
        ("A man walks so the answer is C", 2),
        ("It is a cat, answer: (C)", 2),
        ("The answer is option D", 3),
        ("The answer is A? No, the answer is B.", 1),
        ("Option A is wrong, so the answer is D", 3),
        ("I would choose option B.", 1),
        ("The best option is C", 2),
        ("option B or option C", None),
        ("option A or B", None),
        ("The answer is option B or option C", None),
        # the option itself, word for word
        ("Blue.", 2),
        ("B <answer>blue</answer>", 2),
        ("blue or green", None),
        ("blueish", None),
        # no choice
        ("", None),
        ("A man walks", None),
        ("Based on the video, C", None),
        ("DNA", None),
        ("Apples", None),
        ("a", 0),
        ("E.g. something", None),
        ("A and B", None),
        ("The answer is A or B", None),
        ("The answer is not A", None),
        ("The answer is B-cells", None),
        ("The answer is a cat", None),
        ("Options are many", None),
        ("The answer is F", None),
        ("None of these", None),
    ],
)
def test_parse_answer_never_guesses(text, choice):
    assert parse_answer(text, COLOURS) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Option 2", 1),
        ("option 2.", 1),
        ("Option 2: He sits.", 1),
        ("He sits", 1),
        ("A", 0),
        ("Option 3", None),
        ("Option 1: He sits.", None),
        ("Option 1 or Option 2", None),
        ("The best option is Option 2", None),
    ],
)
def test_a_benchmarks_own_labels_name_an_option(text, choice):
    options, labels = ("He stands.", "He sits."), ("Option 1", "Option 2")
    assert parse_answer(text, options, labels) == choice
    labelled = row("He sits.", options).model_copy(update={"meta": {"labels": list(labels)}})
    assert is_correct(text, labelled) is (None if choice is None else choice == 1)


def test_every_taught_answer_parses_back_to_its_option():
    options = tuple(f"option {i}" for i in range(26))
    for index, option in enumerate(options):
        assert parse_answer(answer_text(row(option, options)), options) == index


def test_is_correct_separates_wrong_from_unparsed():
    question = row("blue", COLOURS)
    assert is_correct("C", question) is True
    assert is_correct("A", question) is False
    assert is_correct("blue or so", question) is None
    free = row("Dolly  Zoom.")
    assert is_correct("dolly zoom", free) is True
    assert is_correct("<answer> Dolly\nzoom. </answer>", free) is True
    for wrong in ("zoom", "o", "not a dolly zoom"):
        assert is_correct(wrong, free) is False
    assert is_correct(" ", free) is None
