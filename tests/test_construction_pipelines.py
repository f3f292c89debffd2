"""LTX-2 and HunyuanVideo 1.5 against diffusers' own pipelines, tiny and random."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    HunyuanVideo15ImageToVideoPipeline,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image
from tiny_pipelines import save_tiny_hunyuan, save_tiny_ltx2

from storm_vlm.construction.config import BuildConfig
from storm_vlm.construction.generators import GENERATORS
from storm_vlm.construction.types import Generator, Request
from storm_vlm.data.row import Row
from storm_vlm.data.video import read_video
from storm_vlm.errors import StormError

PROMPT = "a ball rolls over the board"
PLAIN = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "spatio_temporal_guidance_blocks": None}
SMALL: dict[str, dict[str, Any]] = {
    "ltx-2": {"num_frames": 9, "arguments": {**PLAIN, "max_sequence_length": 16}},
    "hunyuan-video": {"num_frames": 5},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "ltx-2": save_tiny_ltx2(tmp_path_factory.mktemp("ltx")),
        "hunyuan-video": save_tiny_hunyuan(tmp_path_factory.mktemp("hunyuan")),
    }


@pytest.fixture(scope="module")
def request_(reasoning_rows: list[Row]) -> Request:
    row = reasoning_rows[0]
    return Request(row, tuple(read_video(row.video, 6).frames[[0, 2, 5]]), PROMPT)


def generator(models: dict[str, str], name: str, **changes: Any) -> Generator:
    settings = {"model": models[name], "device": "cpu", "dtype": "float32", "area": 32 * 32}
    settings |= {"steps": 2, **SMALL[name], **changes}
    kind = GENERATORS[name]
    return kind(kind.Config.model_validate(settings), 0)


def stock(pipe: Any, **given: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    negative = BuildConfig.model_validate({}).generator_config.negative_prompt  # type: ignore[attr-defined]
    output = pipe(
        prompt=PROMPT,
        negative_prompt=negative,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **given,
    )
    return (output.frames[0] * 255).round().astype(np.uint8)


def small(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame).resize((32, 32), Image.Resampling.LANCZOS)


def test_ltx_2_animates_and_is_led(models: dict[str, str], request_: Request) -> None:
    first, second, third = map(small, request_.keyframes)
    given = {"height": 32, "width": 32, "num_frames": 9, "frame_rate": 24.0, "guidance_scale": 3.0}
    given |= SMALL["ltx-2"]["arguments"]
    made = generator(models, "ltx-2").imagine(request_)
    pipe = LTX2ImageToVideoPipeline.from_pretrained(models["ltx-2"])
    np.testing.assert_array_equal(made.frames, stock(pipe, image=first, **given))
    assert made.fps == 24 and made.frames.shape == (9, 32, 32, 3)
    pipe = LTX2ConditionPipeline.from_pretrained(models["ltx-2"])

    def led(a: Image.Image, b: Image.Image) -> np.ndarray:
        pictures = [LTX2VideoCondition(a, index=0), LTX2VideoCondition(b, index=-1)]
        return stock(pipe, conditions=pictures, **given)

    made = generator(models, "ltx-2", conditioning="first_last").imagine(request_)
    np.testing.assert_array_equal(made.frames, led(first, third))
    made = generator(models, "ltx-2", conditioning="chain").imagine(request_)
    joined = np.concatenate([led(first, second)[:-1], led(second, third)])
    np.testing.assert_array_equal(made.frames, joined)
    with pytest.raises(ValueError, match="8n \\+ 1 \\(9, 17\\)"):
        generator(models, "ltx-2", num_frames=13)


def test_hunyuan_video_animates(models: dict[str, str], request_: Request) -> None:
    made = generator(models, "hunyuan-video", guidance=2.0).imagine(request_)
    pipe: Any = HunyuanVideo15ImageToVideoPipeline.from_pretrained(models["hunyuan-video"])
    plain = stock(pipe, image=small(request_.keyframes[0]), num_frames=5)
    pipe.guider = pipe.guider.new(guidance_scale=2.0)
    expected = stock(pipe, image=small(request_.keyframes[0]), num_frames=5)
    np.testing.assert_array_equal(made.frames, expected)
    assert made.fps == 24 and not np.array_equal(expected, plain)
    with pytest.raises(StormError, match="cannot end at a given frame"):
        generator(models, "hunyuan-video", conditioning="first_last").imagine(request_)


@pytest.mark.parametrize("name", SMALL)
def test_both_run_in_bfloat16(name: str, models: dict[str, str], request_: Request) -> None:
    frames = generator(models, name, dtype="bfloat16").imagine(request_).frames
    assert len(frames) == SMALL[name]["num_frames"] and frames.std() > 0
