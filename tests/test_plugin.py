"""A package of a third party, installed beside ours, is used from the command line without a change to ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storm_vlm.data.row import Row, read_rows
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.registry import Registry, UnknownNameError

PLUGIN = """
import numpy as np
from storm_vlm.configs import Settings
from storm_vlm.construction.types import Generator, Imagined
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.inference.reply import Reply

class FadeConfig(Settings):
    frames: int = 4

class Fade(Generator):
    Config = FadeConfig
    name = "fade"
    def imagine(self, request):
        levels = np.linspace(1, 0.5, self.config.frames)[:, None, None, None]
        return Imagined((request.keyframes[0] * levels).astype(np.uint8), 4.0)

def pairs(item):
    return [{"video": item["clip"], "question": item["q"], "answer": item["a"]}]

class Parrot(Reasoner):
    def __init__(self, model, frames, max_new_tokens=None):
        super().__init__(frames, max_new_tokens)
    settings = property(lambda self: {})
    def prompt(self, question):
        return question.question
    def answer(self, questions):
        return [Reply("four") for _ in questions]
"""
UNTITLED = """
from storm_vlm.evaluation.benchmarks import Benchmark

class Untitled(Benchmark):
    name = "untitled"
    def row(self, published, videos, task, number):
        return None
"""
ENTRY_POINTS = """
[storm_vlm.generators]
fade = fade_plugin:Fade
keyframes = fade_plugin:Fade
[storm_vlm.importers]
pairs = fade_plugin:pairs
[storm_vlm.reasoners]
parrot = fade_plugin:Parrot
broken = fade_plugin:NotThere
[storm_vlm.benchmarks]
untitled = untitled_benchmark:Untitled
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip installs it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "fade_plugin.py").write_text(PLUGIN)
    (folder / "untitled_benchmark.py").write_text(UNTITLED)
    metadata = folder / "fade_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fade-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def storm(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "storm_vlm", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_three_seams_from_the_command_line(
    site: Path, reasoning_rows: list[Row], tmp_path: Path
) -> None:
    source, rows = tmp_path / "source.json", tmp_path / "rows.jsonl"
    clips = [row.video for row in reasoning_rows[:2]]
    objects = [{"clip": c, "q": f"How many, {i}?", "a": "four"} for i, c in enumerate(clips)]
    source.write_text(json.dumps(objects))
    done = storm(site, "import", "pairs", source, rows, "--videos", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row.id for row in read_rows(rows)] == ["pairs-0", "pairs-1"]

    settings = ["generator=fade", "generator_config.frames=6", "filters.mismatch=null"]
    done = storm(site, "build", "--source", rows, "--out", tmp_path / "out", *settings)
    assert done.returncode == 0, done.stderr
    built = read_rows(tmp_path / "out/rows.jsonl")
    thoughts = [row.thought_video for row in built if row.thought_video]
    assert [thought.generator for thought in thoughts] == ["fade", "fade"]
    assert thoughts[0].provenance["settings"] == {"frames": 6}
    settings[1] = "generator_config.frmes=6"
    done = storm(site, "build", "--source", rows, "--out", tmp_path / "out", *settings)
    assert done.returncode == 1 and "generator_config.frmes" in done.stderr

    done = storm(site, "evaluate", shipped("storm"), rows, "--reasoner", "parrot", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"]["mean"] == 1.0
    assert "parrot" in storm(site, "evaluate", "--help").stdout
    for option, part, fault in (
        ("--reasoner", "broken", "fade_plugin:NotThere"),
        ("--benchmark", "untitled", "Untitled has no title"),
    ):
        done = storm(site, "evaluate", shipped("storm"), rows, option, part)
        assert done.returncode == 1 and fault in done.stderr and "Traceback" not in done.stderr


def test_no_package_takes_a_name_away(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    other = tmp_path / "other_plugin-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[storm_vlm.generators]\nfade = other:Fade\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(site))
    registry: Registry[type] = Registry("generators", {"keyframes": "builtins:dict"})
    assert registry["keyframes"] is dict and list(registry) == ["keyframes", "fade"]
    assert registry["fade"].name == "fade"
    assert [record.getMessage() for record in caplog.records] == [
        "generators: 'keyframes' of the package fade-plugin is not used, because builtins:dict has the name: "
        "give it another",
        "generators: 'fade' of the package other-plugin is not used, because fade_plugin:Fade has the name: "
        "give it another",
    ]


def test_names_are_registered_once() -> None:
    registry: Registry[type] = Registry("nothing", {"ours": "builtins:dict"})
    assert registry.register("mine")(list) is list and registry["mine"] is list
    registry.register("mine")(list)
    for name in ("mine", "ours"):
        with pytest.raises(ValueError, match=f"{name}' is registered already"):
            registry.register(name)(int)
    with pytest.raises(UnknownNameError, match="nothing: there is no 'x'; choose from ours, mine"):
        registry["x"]
