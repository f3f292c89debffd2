import pytest
from tiny import tiny_processor

from storm_vlm.data.prompt import (
    LATENT_MODES,
    answer_text,
    build_messages,
    option_letter,
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
