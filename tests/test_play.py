"""The playground: what it shows is what the model does; a browser on a phone shows it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_serving import serving

from storm_vlm.data.video import read_video
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.play import add_playground, think

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


def test_what_is_shown_is_what_the_model_does(storm: StormPipeline, reasoning_rows) -> None:
    off = StormPipeline(storm.model, storm.processor, latent_mode="off")
    same = []
    for row, another in zip(reasoning_rows[:3], reasoning_rows[3:6], strict=True):
        clip, other = read_video(row.video, 6), read_video(another.video, 6)
        thought = think(storm, clip, row.question, other)
        assert thought.answers["its own slots"] == storm.answer(clip, row.question).text
        assert thought.answers["latents off"] == off.answer(clip, row.question).text
        swapped = think(storm, clip, row.question, clip)
        assert swapped.answers["another clip's slots"] == swapped.answers["its own slots"]
        same.append(thought.answers["zeroed slots"] == thought.answers["its own slots"])
        similarity = torch.tensor(thought.similarity)
        assert similarity.shape == (8, len(thought.frames)) and similarity.abs().max() <= 1
    assert not all(same)  # this model needs its slots


@pytest.mark.skipif(BROWSER is None, reason="drives Chromium")
def test_a_phone_shows_an_answer(storm: StormPipeline, tmp_path: Path) -> None:
    with serving(storm, add=add_playground) as server:
        page = f"http://127.0.0.1:{server.port}/play#0"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        options += ["--window-size=390,844", "--virtual-time-budget=20000", "--dump-dom", page]
        done = subprocess.run([str(BROWSER), *options], capture_output=True, text=True, timeout=60)
    shown = done.stdout
    assert re.search(r'<div id="answer">[^<]+</div>', shown), shown[-2000:]
    assert shown.count('class="cell"') == 8 * 3  # slots, and steps of time
    assert "another clip's slots" in shown and 'role="alert"></p>' in shown
