"""Answering from a checkpoint: the shipped one, a stock one, files of other software, the command."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import accelerate
import command_line
import numpy as np
import pytest
import torch

from storm_vlm import StormPipeline
from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import PromptError
from storm_vlm.data.row import read_rows
from storm_vlm.data.video import read_video, write_video
from storm_vlm.errors import InputError
from storm_vlm.inference.chat import Turn
from storm_vlm.inference.local_chat import LocalChat
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.lab.world.mirrors import NUM_FRAMES

QUESTION = "Where will the ball be after 5 more steps?"


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


def test_the_shipped_model_reasons_in_latent_slots(storm, reasoning_rows) -> None:
    answers = storm.answer_batch(reasoning_rows)
    budget = storm.model.config.latent_budget
    assert budget == 8 and all(0 < answer.slots_used <= budget for answer in answers)
    assert all(answer.text and answer.seconds["total"] > 0 for answer in answers)


def test_a_batch_answers_as_each_row_alone(storm, reasoning_rows) -> None:
    together = storm.answer_batch(reasoning_rows)
    alone = [storm.answer_batch([row])[0] for row in reasoning_rows]
    assert [(a.text, a.slots_used, a.forced_end) for a in together] == [
        (a.text, a.slots_used, a.forced_end) for a in alone
    ]


def test_weights_that_accelerate_offloads_answer_the_same(reasoning_rows) -> None:
    storm = StormPipeline.from_pretrained(str(shipped("storm")), device="cpu")
    expected = storm.answer_batch(reasoning_rows[:2])
    accelerate.cpu_offload(storm.model, torch.device("cpu"))
    assert storm.model.device.type == "meta"
    offloaded = storm.answer_batch(reasoning_rows[:2])
    assert [a.text for a in offloaded] == [a.text for a in expected]


@pytest.mark.parametrize("mode", ["force", "auto", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_questions_about_one_clip_are_answered_as_each_alone(tmp_path, mode, dtype) -> None:
    """To the token and the slot, though its features, and what stands before the question, are computed once."""
    rows = read_rows(build_world(tmp_path, "reasoning", "test", 3, questions=4))
    storm = StormPipeline.from_pretrained(str(shipped("storm")), dtype=dtype, latent_mode=mode)
    clips = {row.video: read_video(row.video, NUM_FRAMES) for row in rows}
    asked = [Question(clips[row.video], row.question, row.options) for row in rows]
    patches = len(storm.collator.videos.process(clips[rows[0].video])["pixel_values_videos"])
    text_too = [*asked[:4], Question(None, "What is a ball?")]
    for questions, videos in ((asked, 3), (asked[1:6], 2), (asked[::4], 3), (text_too, 4)):
        alone = [storm.answer_batch([question])[0] for question in questions]
        seen: list[int] = []
        hook = storm.model.get_encoder("video").register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        together = storm.answer_batch(questions)
        hook.remove()
        without = [[replace(answer, seconds={}) for answer in way] for way in (together, alone)]
        assert without[0] == without[1]
        assert sum(seen) == videos * patches
        spent = together[0].seconds
        assert sum(v for k, v in spent.items() if k != "total") <= spent["total"] * 1.001


def test_beams_do_without_a_shared_cache(backbone, tmp_path) -> None:
    rows = read_rows(build_world(tmp_path, "reasoning", "test", 1, questions=2))
    storm = StormPipeline.from_pretrained(str(backbone))
    alone = [storm.answer_batch([row], num_beams=2)[0].text for row in rows]
    assert [answer.text for answer in storm.answer_batch(rows, num_beams=2)] == alone


def test_answer_equals_plain_generate(storm, reasoning_rows) -> None:
    row = reasoning_rows[0]
    inputs = storm.collator.collate_prompts([row], "force")
    output = storm.model.generate(**inputs, max_new_tokens=42)
    text = storm.processor.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert storm.answer(row.video, row.question).text == text.strip()


def test_greedy_is_greedy_whatever_the_checkpoint_asks_for(reasoning_rows) -> None:
    pipeline = StormPipeline.from_pretrained(str(shipped("storm")))
    rows = reasoning_rows[:4]
    expected = [answer.text for answer in pipeline.answer_batch(rows)]
    asked = {"repetition_penalty": 5.0, "num_beams": 3, "do_sample": True, "min_new_tokens": 9}
    for name, value in {**asked, "suppress_tokens": [*range(200)]}.items():
        setattr(pipeline.model.generation_config, name, value)
    assert [answer.text for answer in pipeline.answer_batch(rows)] == expected
    penalized = pipeline.answer_batch(rows, repetition_penalty=5.0)
    assert [answer.text for answer in penalized] != expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("num_return_sequences", 2),
        ("output_latent_states", False),
        ("latent_mode", "off"),
        ("return_dict_in_generate", False),
        ("max_length", 9),
    ],
)
def test_what_the_pipeline_decides_is_refused_by_name_before_any_work(storm, name, value) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        storm.answer("absent.mp4", QUESTION, **{name: value})
    with pytest.raises(InputError, match=f"{name}="):
        Latent(storm, **{name: value})


def test_what_says_what_the_pipeline_does_anyway_is_taken(storm, backbone, reasoning_rows) -> None:
    rows = reasoning_rows[:2]
    same = {"num_beams": 1, "num_return_sequences": 1, "latent_mode": "force"}
    expected = [answer.text for answer in storm.answer_batch(rows)]
    assert [answer.text for answer in storm.answer_batch(rows, **same)] == expected
    assert len(StormPipeline.from_pretrained(backbone).answer_batch(rows, num_beams=2)) == 2


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        (" ", [], "question is empty"),
        (QUESTION, ["left", " "], "none be empty"),
        (QUESTION, ["left", "left"], "must differ"),
        (QUESTION, ["A. left", "B. left"], "must differ"),
    ],
)
def test_what_cannot_be_asked_is_refused(storm, question, options, message) -> None:
    with pytest.raises(InputError, match=message):
        storm.answer("absent.mp4", question, options)


def test_labelled_options_are_lettered_once(storm, reasoning_rows) -> None:
    question = Question("a.mp4", QUESTION, ("A. left", "B. right"))
    assert question.options == ("left", "right")
    video = reasoning_rows[0].video
    labelled, bare = (
        storm.answer(video, QUESTION, options)
        for options in (["A) left", "B) right"], ["left", "right"])
    )
    assert (labelled.text, labelled.option) == (bare.text, bare.option)


def test_a_prompt_beyond_the_models_length_is_refused(storm, reasoning_rows) -> None:
    row = reasoning_rows[0]
    storm.answer(row.video, row.question)
    said = r"longer than this model can read \(2,048\)"
    with pytest.raises(PromptError, match=said):
        storm.answer(row.video, "ball " * 2100)
    with pytest.raises(PromptError, match=said):
        LocalChat(storm).write([[Turn("user", "ball " * 2100)]], 1)


def test_the_backbone_answers_without_slots(backbone, reasoning_rows) -> None:
    pipeline = StormPipeline.from_pretrained(backbone)
    answer = pipeline.answer(reasoning_rows[0].video, "Where is the ball now?")
    assert pipeline.latent_mode == "off" and answer.slots_used == 0 and answer.text
    with pytest.raises(ValueError, match="no latent slots"):
        StormPipeline.from_pretrained(backbone, latent_mode="force")


def test_off_mode_uses_no_slots(reasoning_rows) -> None:
    pipeline = StormPipeline.from_pretrained(str(shipped("storm")), latent_mode="off")
    assert pipeline.answer(reasoning_rows[0].video, QUESTION).slots_used == 0


@pytest.mark.parametrize(
    ("suffix", "codec", "size"),
    [("mp4", "libx264", 96), ("webm", "libvpx-vp9", 160), ("mkv", "libsvtav1", 256)],
)
def test_other_codecs_sizes_and_rates(storm, reasoning_rows, tmp_path, suffix, codec, size) -> None:
    frames = read_video(reasoning_rows[0].video, NUM_FRAMES).frames
    index = np.arange(size) * frames.shape[1] // size
    resized = np.repeat(frames[:, index][:, :, index], 4, axis=0)  # 16 frames a second
    path = tmp_path / f"clip.{suffix}"
    write_video(path, resized, 16.0, codec=codec)
    answer = storm.answer(str(path), QUESTION, options=("a1", "b2"))
    assert answer.text and answer.slots_used > 0


def test_frames_in_memory_serve_as_a_video(storm, reasoning_rows) -> None:
    row = reasoning_rows[0]
    clip = read_video(row.video, NUM_FRAMES)
    from_clip = storm.answer_batch([Question(clip, row.question)])[0]
    assert from_clip.text == storm.answer(row.video, row.question).text


def run_storm(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "storm_vlm", *arguments], capture_output=True, text=True
    )


def test_the_command_prints_what_python_returns(storm, reasoning_rows) -> None:
    video = reasoning_rows[0].video
    done = run_storm("answer", video, QUESTION, "--max-new-tokens", "2", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    expected = asdict(storm.answer(video, QUESTION, max_new_tokens=2))
    assert expected["tokens"] == 2
    assert printed.pop("seconds").keys() == expected.pop("seconds").keys()
    assert printed == expected


@pytest.mark.parametrize(
    ("video", "arguments", "message"),
    [
        ("absent.mp4", [QUESTION], "absent.mp4: no such video file"),
        (None, [" "], "question is empty"),
        (None, [QUESTION, "--options", "left", "--options", "left"], "must differ"),
        (None, ["<|im_end|>"], "control token"),
    ],
)
def test_the_command_looks_before_it_loads(reasoning_rows, video, arguments, message) -> None:
    video = video or reasoning_rows[0].video
    result = command_line.run_storm("answer", video, *arguments, "--checkpoint", "absent")
    assert result.exit_code == 1 and message in result.stderr


def test_the_command_says_that_no_option_was_chosen(reasoning_rows) -> None:
    options = ["--options", "It falls", "--options", "It stays"]
    done = run_storm("answer", reasoning_rows[0].video, QUESTION, *options)
    assert done.returncode == 0 and done.stderr.count("\n") == 1  # no bar, no warning
    assert done.stdout.startswith("no option was chosen; the model wrote: ")


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    done = run_storm("answer", str(tmp_path / "broken.mp4"), QUESTION)
    assert done.returncode == 1 and "broken.mp4" in done.stderr and "Traceback" not in done.stderr
    done = run_storm("answer", str(tmp_path / "absent.mp4"), QUESTION)
    assert done.returncode == 1 and "absent.mp4" in done.stderr
