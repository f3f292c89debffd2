"""The generator against diffusers' own pipeline, on a tiny random Wan in the published layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from kill_trials import bare_rows
from PIL import Image
from stub_teacher import StubTeacher
from tiny_wan import save_tiny_wan

from storm_vlm.construction.build import run
from storm_vlm.construction.config import BuildConfig
from storm_vlm.construction.generators.image_to_video import fit
from storm_vlm.construction.generators.wan import Wan, WanConfig
from storm_vlm.construction.types import Rejected, Request
from storm_vlm.data.row import Row, read_rows
from storm_vlm.data.video import read_video
from storm_vlm.errors import StormError

PROMPT = "a ball rolls over the board"
SMALL = {"device": "cpu", "dtype": "float32", "area": 48 * 48, "num_frames": 9, "steps": 2}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def flf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_wan(tmp_path_factory.mktemp("flf"), "2.1 flf2v")


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_wan(tmp_path_factory.mktemp("a14b"), "2.2 a14b")


@pytest.fixture(scope="module")
def request_(reasoning_rows: list[Row]) -> Request:
    row = reasoning_rows[0]
    return Request(row, tuple(read_video(row.video, 6).frames[[0, 2, 5]]), PROMPT)


def generator(model: str, seed: int = 0, **changes: Any) -> Wan:
    return Wan(WanConfig.model_validate({"model": model, **SMALL, **changes}), seed)


def stock(model: str, first: np.ndarray, last: np.ndarray | None, **changes: Any) -> np.ndarray:
    """The same video by diffusers alone."""
    return pipe_video(WanImageToVideoPipeline.from_pretrained(model), first, last, **changes)


def pipe_video(
    pipe: Any, first: np.ndarray, last: np.ndarray | None = None, **changes: Any
) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    images = [None if frame is None else Image.fromarray(frame) for frame in (first, last)]
    size = changes.get("width", 48), changes.get("height", 48)
    resized = [image and image.resize(size, Image.Resampling.LANCZOS) for image in images]
    arguments = {
        "negative_prompt": WanConfig.model_validate({}).negative_prompt,
        "height": 48,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(0),
        **changes,
    }
    output = pipe(image=resized[0], last_image=resized[1], prompt=PROMPT, **arguments)
    return (output.frames[0] * 255).round().astype(np.uint8)


def test_the_first_keyframe_is_animated(wan: str, request_: Request) -> None:
    made = generator(wan).imagine(request_)
    expected = stock(wan, request_.keyframes[0], None)
    np.testing.assert_array_equal(made.frames, expected)
    assert made.frames.shape == (9, 48, 48, 3) and made.fps == 16 and made.costs["seconds"] > 0


def test_what_decides_the_video_is_in_its_key(wan: str, request_: Request) -> None:
    """Each thing changes the video, and is part of what the video is found by."""
    plain = generator(wan)
    frames = plain.imagine(request_).frames
    other = Request(request_.row, request_.keyframes[1:], PROMPT)
    words = Request(request_.row, request_.keyframes, "something else altogether")
    for changed in (other, words):
        assert plain.determined_by(changed) != plain.determined_by(request_)
        assert not np.array_equal(plain.imagine(changed).frames, frames)
    for changes in ({"guidance": 1.0}, {"steps": 3}, {"flow_shift": 9.0}, {"num_frames": 13}):
        changed = generator(wan, **changes)
        assert changed.settings() != plain.settings()
        assert not np.array_equal(changed.imagine(request_).frames, frames)
    assert not np.array_equal(generator(wan, seed=1).imagine(request_).frames, frames)
    np.testing.assert_array_equal(generator(wan).imagine(request_).frames, frames)


def test_from_the_first_keyframe_to_the_last(flf: str, wan: str, request_: Request) -> None:
    frames = request_.keyframes
    made = generator(flf, conditioning="first_last").imagine(request_).frames
    np.testing.assert_array_equal(made, stock(flf, frames[0], frames[-1]))
    with pytest.raises(Rejected, match="two keyframes"):
        one = Request(request_.row, frames[:1], PROMPT)
        generator(flf, conditioning="first_last").determined_by(one)
    with pytest.raises(StormError, match="cannot end at a given frame"):
        generator(wan, conditioning="first_last").imagine(request_)


def test_a_chain_goes_from_keyframe_to_keyframe(flf: str, wan: str, request_: Request) -> None:
    first, second, third = request_.keyframes
    made = generator(flf, conditioning="chain").imagine(request_).frames
    expected = [stock(flf, first, second)[:-1], stock(flf, second, third)]
    np.testing.assert_array_equal(made, np.concatenate(expected))
    made = generator(wan, conditioning="chain").imagine(request_).frames  # cannot be led to an end
    expected = [stock(wan, frame, None) for frame in request_.keyframes]
    np.testing.assert_array_equal(made, np.concatenate(expected))


def test_a_lora_is_loaded(wan: str, request_: Request, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = generator(wan).load()
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    weights = get_peft_model_state_dict(pipe.transformer)
    WanImageToVideoPipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    plain = generator(wan, guidance=1.0).imagine(request_).frames
    distilled = generator(wan, guidance=1.0, lora=str(tmp_path)).imagine(request_).frames
    assert not np.array_equal(plain, distilled)


def test_wan_22_a14b_has_two_transformers(a14b: str, request_: Request) -> None:
    """Each with a guidance of its own; it may end at a picture, and need not."""
    first, second, third = request_.keyframes
    steps = {"steps": 3, "flow_shift": 3.0}
    few = {"num_inference_steps": 3}
    made = generator(a14b, **steps).imagine(request_)
    np.testing.assert_array_equal(made.frames, stock(a14b, first, None, **few))
    assert made.fps == 16
    made = generator(a14b, guidance_2=1.5, **steps).imagine(request_).frames
    np.testing.assert_array_equal(made, stock(a14b, first, None, guidance_scale_2=1.5, **few))
    made = generator(a14b, conditioning="first_last", **steps).imagine(request_).frames
    np.testing.assert_array_equal(made, stock(a14b, first, third, **few))
    made = generator(a14b, conditioning="chain", **steps).imagine(request_).frames
    expected = [stock(a14b, first, second, **few)[:-1], stock(a14b, second, third, **few)]
    np.testing.assert_array_equal(made, np.concatenate(expected))
    one = Request(request_.row, request_.keyframes[:1], PROMPT)
    assert len(generator(a14b, conditioning="chain", **steps).imagine(one).frames) == 9


def test_wan_22_a14b_takes_two_loras_or_none(
    a14b: str, wan: str, request_: Request, tmp_path: Path
) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    for name, seed in (("high", 1), ("low", 2)):
        pipe = generator(a14b).load()
        torch.manual_seed(seed)
        adapter = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(adapter)
        weights = get_peft_model_state_dict(pipe.transformer)
        weights = {key: tensor * 20 for key, tensor in weights.items()}
        WanImageToVideoPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=weights, weight_name=f"{name}.safetensors"
        )
    files = {"lora": str(tmp_path), "lora_file": "high.safetensors"}
    both = files | {"lora_file_2": "low.safetensors"}
    made = generator(a14b, **both, steps=3).imagine(request_).frames
    pipe = WanImageToVideoPipeline.from_pretrained(a14b)
    pipe.load_lora_weights(tmp_path, weight_name="high.safetensors")
    one = pipe_video(pipe, request_.keyframes[0], num_inference_steps=3)
    pipe.load_lora_weights(tmp_path, weight_name="low.safetensors", load_into_transformer_2=True)
    np.testing.assert_array_equal(
        made, pipe_video(pipe, request_.keyframes[0], num_inference_steps=3)
    )
    assert not np.array_equal(made, one)
    for half in (files, {"lora_2": str(tmp_path), "lora_file_2": "low.safetensors"}):
        with pytest.raises(StormError, match="two transformers"):
            generator(a14b, **half).imagine(request_)
    for second in ({"lora_file_2": "low.safetensors"}, {"guidance_2": 2.0}):
        with pytest.raises(StormError, match="one transformer"):
            generator(wan, **second).imagine(request_)


def test_wan_22_5b_has_a_rate_and_a_size_of_its_own(request_: Request, tmp_path: Path) -> None:
    small = save_tiny_wan(tmp_path, "2.2 5b")
    made = generator(small, area=80 * 80).imagine(request_)
    assert made.fps == 24 and made.frames.shape == (9, 64, 64, 3)  # 80 is no multiple of 32
    expected = stock(small, request_.keyframes[0], None, height=64, width=64)
    np.testing.assert_array_equal(made.frames, expected)
    with pytest.raises(StormError, match="cannot end at a given frame"):
        generator(small, conditioning="first_last", area=80 * 80).imagine(request_)


def test_precision_is_the_model_card_s(wan: str) -> None:
    pipe = generator(wan, dtype="bfloat16").load()
    assert pipe.vae.dtype == pipe.image_encoder.dtype == torch.float32
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "area", "size"),
    [
        ((720, 1280), 480 * 832, (832, 464)),
        ((1280, 720), 480 * 832, (464, 832)),
        ((480, 480), 480 * 832, (624, 624)),
        ((720, 1280), 720 * 1280, (1280, 720)),
        ((10, 500), 32 * 32, (224, 16)),
    ],
)
def test_a_frame_keeps_its_shape(shape: tuple[int, int], area: int, size: tuple[int, int]) -> None:
    assert fit(np.zeros((*shape, 3), np.uint8), area).size == size


def test_a_number_of_frames_that_wan_would_round_is_refused() -> None:
    with pytest.raises(ValueError, match="4n \\+ 1"):
        BuildConfig.model_validate({"generator": "wan", "generator_config": {"num_frames": 80}})


def test_rows_with_wan_from_end_to_end(wan: str, tmp_path: Path) -> None:
    source = bare_rows(tmp_path, 2)
    with StubTeacher() as teacher:
        config = BuildConfig.model_validate(
            {
                "teacher": {"model": "stub", "base_url": teacher.url},
                "generator_config": {"model": wan, **SMALL},
                "filters": {"blank": None, "frozen": None, "flicker": None, "mismatch": None},
            }
        )
        assert run(source, tmp_path / "out", config)["kept"] == 2
        assert len(teacher.calls) == 6  # keyframes, plan and prompt of two rows
        again = run(source, tmp_path / "out", config)
        assert again["thought_videos_made"] == 0 and len(teacher.calls) == 6
    for row in read_rows(tmp_path / "out" / "rows.jsonl"):
        thought = row.thought_video
        assert thought and (thought.source, thought.generator) == ("generated", wan)
        frame = read_video(row.video, 1, row.keyframes[0], row.keyframes[0] + 1e-3).frames[0]
        prompt = thought.provenance["prompt"]
        expected = generator(wan).imagine(Request(row, (frame,), prompt)).frames
        shown = read_video(thought.path, 99).frames
        assert shown.shape == expected.shape
        assert abs(shown.astype(int) - expected).mean() < 12  # noise, encoded
        assert 80 <= len(prompt.split()) <= 200 and "mismatch" in thought.provenance["scores"]
        costs = Path(thought.path).with_suffix(".json")
        assert json.loads(costs.read_text())["frames"] == 9


def test_without_words_nothing_is_generated(tmp_path: Path) -> None:
    source = bare_rows(tmp_path, 1)
    with pytest.raises(StormError, match=r"name a teacher\.model"):
        run(source, tmp_path / "out", BuildConfig.model_validate({}))
