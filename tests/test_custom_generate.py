"""Our checkpoints in plain transformers, where this package cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import EOS, TOKENS, left_pad, prompts, tiny_model
from transformers import AutoModelForImageTextToText, GenerationConfig

from storm_vlm.data.row import Row
from storm_vlm.data.video import read_video, video_metadata
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.model.custom_generate import source
from storm_vlm.model.modeling import StormForConditionalGeneration, enable_latents

PLAIN = """
import sys
for package in ("storm_vlm", "peft", "pydantic", "av"):
    sys.modules[package] = None
import torch
from transformers import AutoModelForImageTextToText, pipeline
folder, inputs, outputs = sys.argv[1:]
given = torch.load(inputs, weights_only=False)
load = AutoModelForImageTextToText.from_pretrained
model, stock = load(folder, trust_remote_code=True), load(folder)
found = {}
for name, options in given["calls"].items():
    torch.manual_seed(0)
    batch = given["force" if name == "force" else "auto"]
    found[name] = model.generate(**batch, max_new_tokens=20, **options)
    if name == "greedy":
        found["by argument"] = stock.generate(
            **batch, max_new_tokens=20, custom_generate=folder, trust_remote_code=True
        )
found["stock"] = load(folder).generate(**given["auto"], max_new_tokens=20)
found["texts"] = [
    pipeline("image-text-to-text", model=folder, trust_remote_code=trust)(
        text=given["chat"],
        max_new_tokens=20,
        return_full_text=False,
        processor_kwargs={"do_sample_frames": False, "video_metadata": given["metadata"]},
    )[0]["generated_text"]
    for trust in (True, False)
]
torch.save(found, outputs)
"""
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "force": {"latent_mode": "force"},
    "off": {"latent_mode": "off"},
    "four slots": {"latent_budget": 4},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


def test_plain_transformers_writes_the_same_tokens(
    reasoning_rows: list[Row], tmp_path: Path
) -> None:
    pipe = StormPipeline.from_pretrained(str(shipped("storm")))
    rows, clip = reasoning_rows[:6], read_video(reasoning_rows[0].video, 6)
    auto, force = (pipe.collator.collate_prompts(rows, mode) for mode in ("auto", "force"))
    content = [
        {"type": "video", "video": list(clip.frames)},
        {"type": "text", "text": rows[0].question},
    ]
    given = {
        "auto": auto,
        "force": force,
        "calls": CALLS,
        "chat": [{"role": "user", "content": content}],
        "metadata": [video_metadata(clip)],
    }
    torch.save(given, tmp_path / "inputs")
    paths = [str(shipped("storm")), str(tmp_path / "inputs"), str(tmp_path / "outputs")]
    run = subprocess.run([sys.executable, "-c", PLAIN, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "outputs", weights_only=False)
    expected = {}
    for name, options in CALLS.items():
        torch.manual_seed(0)
        batch = force if name == "force" else auto
        expected[name] = pipe.model.generate(**batch, max_new_tokens=20, **options)
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(found["by argument"], expected["greedy"])
    assert not torch.equal(expected["off"][:, : expected["greedy"].shape[1]], expected["greedy"])
    answers = pipe.answer_batch(rows)
    assert found["texts"] == [answers[0].text, ""]
    assert sum(answer.text == row.answer for answer, row in zip(answers, rows, strict=True)) >= 4
    # The stock model opens the segment, and there its turn ends.
    length, start = auto["input_ids"].shape[1], pipe.model.config.latent_start_token_id
    assert found["stock"][:, length:].tolist() == [[start]] * 6


def test_the_shipped_file_is_what_would_be_written_now() -> None:
    model = StormForConditionalGeneration.from_pretrained(str(shipped("storm")))
    written = (shipped("storm") / "custom_generate/generate.py").read_text()
    assert written == source(model), (
        "write it again: from storm_vlm.model.custom_generate import write_custom_generate; "
        "write_custom_generate(StormForConditionalGeneration.from_pretrained(F), Path(F))"
    )


@pytest.mark.parametrize("ends", [EOS, [EOS, 7], None])
def test_only_a_stock_model_ends_at_a_latent_token(tmp_path: Path, ends: Any) -> None:
    model, batch = tiny_model(), left_pad(prompts())
    model.generation_config.eos_token_id = ends
    expected = model.generate(**batch)
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    own = [] if ends is None else [ends] if isinstance(ends, int) else ends
    assert saved.eos_token_id == [*own, *TOKENS]
    again = StormForConditionalGeneration.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert again.generation_config.eos_token_id == own and "generate" not in vars(again)
    assert torch.equal(again.generate(**batch), expected)
    assert torch.equal(again.generate(**batch, generation_config=saved), expected)
    again.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [*own, *TOKENS]
    stock: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(enable_latents(stock).generate(**batch), expected)


def test_without_slots_there_is_nothing_to_say(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.latent_budget = 0
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "custom_generate").exists()
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == EOS
