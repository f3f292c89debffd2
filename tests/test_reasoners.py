"""Reasoners on a real micro model and on a real endpoint: the same prompts, bounds, history, counts and times."""

import base64
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from scripted_endpoint import serving

from storm_vlm import StormPipeline
from storm_vlm.data.collator import Question
from storm_vlm.data.video import read_video
from storm_vlm.errors import StormError
from storm_vlm.inference.chat import Turn
from storm_vlm.inference.client import RefusedError
from storm_vlm.inference.frames import FrameCache, Frames
from storm_vlm.inference.local_chat import LocalChat
from storm_vlm.inference.reasoners import build_reasoner
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.inference.reasoners.single_turn import ChainOfThought, Direct
from storm_vlm.inference.reasoners.tool_loop import ToolError, ToolLoop, crop_window
from storm_vlm.inference.remote_chat import RemoteChat
from storm_vlm.lab.bench.infer import Lengths, fixed_reasoners
from storm_vlm.lab.checkpoints import shipped

K, FRAMES = 8, Frames(6)
ANSWER = "<think>It rolls on.</think> <answer>B</answer>"


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


@pytest.fixture(scope="module")
def rows(reasoning_rows):
    """Some with options, some without."""
    answers = sorted({row.answer for row in reasoning_rows})
    choices = [r.model_copy(update={"options": tuple(answers)}) for r in reasoning_rows[:3]]
    return [*choices, *reasoning_rows[3:6]]


def call(start: object, end: object) -> str:
    window = {"start_time": start, "end_time": end}
    return f"<tool_call>{json.dumps({'name': 'crop_video', 'arguments': window})}</tool_call>"


def off(storm: StormPipeline) -> StormPipeline:
    return StormPipeline(storm.model, storm.processor, latent_mode="off")


def test_direct_asks_and_answers_as_the_pipeline_without_latents(storm, rows) -> None:
    chat = LocalChat(storm)
    direct = Direct(chat, FRAMES)
    turns = [[Turn("user", direct.prompt(row), FRAMES.read(row))] for row in rows]
    ours, pipeline = chat.inputs(turns), off(storm)
    theirs = pipeline.collator.collate_prompts(rows, "off")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(torch.as_tensor(ours[name]), tensor, rtol=0, atol=0, msg=name)
    replies, answers = direct.answer(rows), pipeline.answer_batch(rows)
    for reply, answer in zip(replies, answers, strict=True):
        assert (reply.text, reply.tokens) == (answer.text, answer.tokens)
        assert (reply.prompt_tokens, reply.visual_tokens) == (answer.prompt_tokens, 48)
        assert (reply.slots_used, reply.opened, reply.rounds) == (0, False, 1)


def test_latent_is_the_pipeline(storm, rows) -> None:
    replies = Latent(storm, FRAMES).answer(rows)
    for reply, answer in zip(replies, storm.answer_batch(rows), strict=True):
        assert (reply.text, reply.slots_used) == (answer.text, answer.slots_used)
        assert reply.opened and reply.frame_times == (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def test_counts_are_the_tokenizers(storm, rows) -> None:
    (reply,) = Latent(storm, FRAMES).answer(rows[:1])
    inputs = storm.collator.collate_prompts(rows[:1], "force")
    ids = storm.model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    written = ids.tolist().index(storm.processor.tokenizer.eos_token_id) + 1
    assert reply.tokens == written - reply.slots_used - 1  # the end of the segment
    assert reply.prompt_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("protocol", ["cot", "grounded_cot"])
def test_chains_are_bounded_and_do_not_depend_on_the_batch(storm, rows, protocol) -> None:
    chain = build_reasoner(protocol, storm, FRAMES, 12)
    together = chain.answer(rows)
    assert [r.text for r in together] == [chain.answer([row])[0].text for row in rows]
    assert all(0 < reply.tokens <= 12 for reply in together)
    tags = ("<answer>", "<think>") + ("<time>", "<caption>") * (protocol == "grounded_cot")
    assert all(tag in chain.prompt(row) for tag in tags for row in rows)
    assert ["option's letter" in chain.prompt(row) for row in rows] == [True] * 3 + [False] * 3


def test_phases_are_measured_where_the_time_goes(storm, rows) -> None:
    """Slow the vision tower and every step of the language model, and look where that turns up."""
    parts = storm.model.model
    tower, language = parts.visual.blocks[0], parts.language_model.layers[0]
    hooks = [
        module.register_forward_pre_hook(lambda *_, pause=pause: time.sleep(pause))
        for module, pause in ((tower, 0.2), (language, 0.03))
    ]
    try:
        slow = Latent(
            storm,
            FRAMES,
            4,
            min_new_tokens=4 + K + 1,
            suppress_tokens=[storm.model.config.latent_end_token_id],
        )
        (reply,) = slow.answer(rows[:1])
    finally:
        for hook in hooks:
            hook.remove()
    assert (reply.slots_used, reply.tokens) == (K, 4)
    seconds = reply.seconds
    assert 0.2 <= seconds["vision"] < 0.5
    assert 0.03 <= seconds["prefill"] < 0.2
    assert seconds["latent"] >= K * 0.03
    assert 4 * 0.03 <= seconds["answer"] < seconds["latent"]
    whole = sum(spent for phase, spent in seconds.items() if phase != "total")
    assert whole == pytest.approx(seconds["total"], rel=0.05)


def test_fixed_lengths_and_the_tool_loop_on_a_local_model(storm, rows) -> None:
    """The model's own time; later rounds read what earlier ones were shown and said."""
    lengths = Lengths(answer=3, cot=12, grounded_cot=14, tool_rounds=2, tool_tokens=90)
    found = {
        name: reasoner.answer(rows[3:5])
        for name, reasoner in fixed_reasoners(storm, lengths, 1.25).items()
    }
    tokens = {name: [reply.tokens for reply in replies] for name, replies in found.items()}
    assert tokens == {
        "latent": [3, 3],
        "direct": [3, 3],
        "cot": [12, 12],
        "grounded_cot": [14, 14],
        "tools": [183, 183],
    }
    tools, cot = found["tools"][0], found["cot"][0]
    assert tools.rounds == 3 and len(tools.transcript) == 4
    assert tools.frame_times[:6] == cot.frame_times and len(tools.frame_times) == 6 + 2 + 2
    assert tools.visual_tokens == 48 + 2 * 16  # two frames make a grid
    assert tools.prompt_tokens > cot.prompt_tokens + 2 * 90
    assert tools.seconds["tool"] > 0 and found["latent"][0].slots_used == K


def test_an_endpoint_sees_frames_with_their_times(rows) -> None:
    row = rows[0].model_copy(update={"start": 0.5})
    with serving(lambda messages: ANSWER) as (url, requests):
        (reply,) = ChainOfThought(RemoteChat(url, "some-model"), FRAMES, 50).answer([row])
    assert reply.text == ANSWER and (reply.tokens, reply.prompt_tokens) == (100, 1000)
    assert reply.seconds.keys() == {"decode", "answer", "total"}
    (request,) = requests
    assert (request["model"], request["max_tokens"], request["temperature"]) == (
        "some-model",
        50,
        0,
    )
    *parts, text = request["messages"][0]["content"]
    clip = read_video(row.video, 6, 0.5)
    assert [part["text"] for part in parts[::2]] == [f"{t - 0.5:.2f} s" for t in clip.timestamps]
    assert text["text"].startswith(row.question) and "<answer>" in text["text"]
    for part, frame in zip(parts[1::2], clip.frames, strict=True):
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        shown = np.asarray(Image.open(io.BytesIO(data)), float)
        assert shown.shape == frame.shape and abs(shown - frame).mean() < 6


def test_tools_keep_their_history_and_show_new_frames(rows) -> None:
    first = f"<think>Look.<|im_end|></think>{call(0.5, 1.0)} and I see nothing"
    said = [first, call(-3, 99), ANSWER]
    with serving(lambda messages: said[len(messages) // 2]) as (url, requests):
        tools = ToolLoop(RemoteChat(url, "m"), FRAMES, 50, fps=4.0)
        (reply,) = tools.answer(rows[:1])
    assert reply.text == ANSWER and reply.rounds == 3 and reply.tokens == 300
    first, second, third = (request["messages"] for request in requests)
    assert second[:1] == first and third[:3] == second  # nothing is lost, nothing rewritten
    assert second[1] == {"role": "assistant", "content": f"<think>Look.</think>{call(0.5, 1.0)}"}
    looks = [
        [part["text"] for part in message["content"] if part["type"] == "text"][:-1]
        for message in third[::2]
    ]
    assert looks[0] == [f"{t / 4:.2f} s" for t in range(6)]
    assert looks[1] == ["0.50 s", "1.00 s"]  # 4 frames a second for half a second
    assert len(looks[2]) == 5 and looks[2][-1] == "1.25 s"
    assert "0.00 to 1.25 s" in third[4]["content"][-1]["text"]  # cut to the video
    assert len(reply.frame_times) == sum(map(len, looks))
    assert reply.transcript[0].endswith("</tool_call>") and "<tool_response>" in reply.transcript[1]


def test_looks_are_bounded_and_rows_finish_on_their_own(rows) -> None:
    def script(messages):
        patient = rows[1].question in messages[0]["content"][-1]["text"]
        return call(0.0, 1.0) if patient else ANSWER

    other = rows[0].model_copy(update={"question": "Another one?"})
    with serving(script) as (url, requests):
        tools = ToolLoop(RemoteChat(url, "m"), FRAMES, 50)
        quick, stuck = tools.answer([other, rows[1]])
    assert (quick.rounds, stuck.rounds, len(requests)) == (1, 6, 7)
    assert len(stuck.transcript) == 10 and "last look" in stuck.transcript[-1]
    assert not any("last look" in said for said in stuck.transcript[:-1])
    assert stuck.text == call(0.0, 1.0)  # no answer


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("<tool_call>{oops</tool_call>", "not JSON"),
        ("<tool_call>crop_video(0, 1)", "not JSON"),
        ('<tool_call>{"name": "zoom"}</tool_call>', "only tool"),
        ('<tool_call>{"name": "crop_video"}</tool_call>', "needs arguments"),
        (call("0.5", 1.0), "numbers"),
        (call(True, 1.0), "numbers"),
        (call(1.0, 0.5), "before end_time"),
        (call(7, 9), "within 0 to 1.25 s"),
        (call(0.1, float("nan")), "numbers"),
    ],
)
def test_the_model_is_told_what_is_wrong_with_its_call(rows, said, told) -> None:
    with serving(lambda messages: said if len(messages) == 1 else ANSWER) as (url, requests):
        (reply,) = ToolLoop(RemoteChat(url, "m"), FRAMES, 50).answer(rows[:1])
    response = requests[1]["messages"][-1]
    assert response["role"] == "user" and "Error: " in response["content"]
    assert told in response["content"]
    assert reply.text == ANSWER and reply.rounds == 2 and len(reply.frame_times) == 6


def test_windows_are_cut_to_the_video() -> None:
    arguments = '{"name": "crop_video", "arguments": {"start_time": -1, "end_time": %s}}'
    assert crop_window(arguments % ("9" * 400), 3.0) == (0.0, 3.0)
    with pytest.raises(ToolError, match="JSON"):
        crop_window("[" * 100_000, 3.0)


def test_tools_need_the_file(storm, rows) -> None:
    clip = FRAMES.read(rows[0])
    for video in (None, clip):
        with pytest.raises(StormError, match="give video files"):
            ToolLoop(LocalChat(storm), FRAMES).answer([Question(video, "Where?")])


def test_an_endpoint_that_refuses_is_told_from_one_that_is_not_there(rows) -> None:
    with serving(lambda messages: 400) as (url, _), pytest.raises(RefusedError, match="no such"):
        Direct(RemoteChat(url, "m"), FRAMES).answer(rows[:1])
    with serving(lambda messages: 401) as (url, _), pytest.raises(OSError, match="check address"):
        Direct(RemoteChat(url, "m"), FRAMES).answer(rows[:1])
    with pytest.raises(OSError, match=url):
        Direct(RemoteChat(url, "m", retries=0), FRAMES).answer(rows[:1])


def test_frames_are_kept_on_disk(rows, tmp_path: Path) -> None:
    cache, asked = FrameCache(tmp_path / "cache"), (rows[0].video, 6, rows[0].start, rows[0].end)
    first, again, plain = cache(*asked), cache(*asked), FRAMES.read(rows[0])
    assert plain is not None
    (file,) = (tmp_path / "cache").glob("frames/*/*")
    for clip in (first, again):
        np.testing.assert_array_equal(clip.frames, plain.frames)
        np.testing.assert_array_equal(clip.timestamps, plain.timestamps)
    other = {"frames": plain.frames[::-1].copy(), "timestamps": plain.timestamps}
    save_file(other, file)
    assert (cache(*asked).frames == plain.frames[::-1]).all()  # it is what is read
    for damage in (b"", file.read_bytes()[:-40], b"\xff" * 400):  # made again
        file.write_bytes(damage)
        assert (cache(*asked).frames == plain.frames).all()
    assert cache(rows[0].video, 2, 0.0, 1.0).timestamps.tolist() == [0.0, 1.0]


def test_the_last_clip_is_not_read_again(rows) -> None:
    frames = Frames(6)
    first, again, other = frames.read(rows[0]), frames.read(rows[0]), frames.read(rows[1])
    assert first is again and other is not first
    assert frames.read(rows[0]) is not first
    assert frames == Frames(6)


def test_a_bound_on_pixels_makes_fewer_tokens(rows) -> None:
    small = StormPipeline.from_pretrained(str(shipped("storm")), num_frames=6, max_pixels=32 * 32)
    (reply,) = Latent(small).answer(rows[:1])
    assert reply.visual_tokens == 48 / 4
    assert Latent(small).settings["pixels"]["longest_edge"] == 32 * 32
