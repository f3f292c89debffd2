"""Write README's results and pictures from docs/results/*.json: `python dev/tables.py` (`--check` only compares)."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from storm_vlm.lab.reproduce.comparison_table import read_tables
from storm_vlm.lab.reproduce.evidence_charts import dots
from storm_vlm.lab.reproduce.evidence_page import grid_of
from storm_vlm.lab.world.clips import HORIZON
from storm_vlm.lab.world.questions import sample_reasoning
from storm_vlm.lab.world.render import clip_frames, thought_frames
from storm_vlm.lab.world.simulator import REASONING

ROOT = Path(__file__).resolve().parent.parent


def results(found: dict[str, Any]) -> str:
    """The results section, in Markdown: the first tables of docs/results.md."""
    references = found["references"]
    shortcuts, perception = references["shortcuts"], references["perception"]
    best = max(shortcuts, key=lambda name: shortcuts[name])
    lines = [
        f"Micro world, {found['n_test']} test questions about the unseen part, every arm with the same rows and the same number of optimizer "
        f"steps ({found['steps']}); 95% intervals over seeds and questions. All tables, with what differs from the paper: "
        f"[docs/results.md](docs/results.md), written by `{found['command']}` ([figures](docs/results/reproduce.json)).",
        "",
    ]
    for name in ("main", "stages"):
        table = found["tables"][name]
        heading = f"**{table['title']}** ({table['paper']} of the paper)"
        lines += [heading, "", table["paragraph"], "", grid_of(table), ""]
    lines += [
        f"Best shortcut ({best.replace('_', ' ')}): {shortcuts[best]:.1%}; uniform guess: {references['chance']:.1%}.",
        "",
        "![Accuracy of each arm](docs/images/micro.svg)",
        "",
        "Perception of the shipped backbone, in scenes with one ball (as all but the harder split have) and in all: "
        + ", ".join(
            f"{family} {perception['one'][family]:.1%} / {score:.1%}"
            for family, score in perception["all"].items()
        )
        + ".",
    ]
    return "\n".join(lines) + "\n"


def latency(found: dict[str, Any]) -> str:
    """Seconds an item of each reasoner, as a table."""
    run = found["micro cpu"]
    lines = [
        f"What does a way to reason cost? Micro model, {run['threads']} CPU thread, lengths fixed (answer {run['lengths']['answer']} tokens, chain of thought {run['lengths']['cot']}, "
        f"grounded {run['lengths']['grounded_cot']}, {run['lengths']['tool_rounds']} tool rounds of {run['lengths']['tool_tokens']}); median of {run['rounds']} rounds and their range. At 7B on a GPU: {found['7b cuda']} ([figures](docs/results/latency.json), `storm bench latency`):",
        "",
        "| reasoner | seconds an item | times latent | times direct |",
        "|---|---|---|---|",
    ]

    def spread(value: dict[str, float], digits: int) -> str:
        return (
            f"{value['median']:.{digits}f} ({value['low']:.{digits}f} – {value['high']:.{digits}f})"
        )

    for name, one in run["reasoners"].items():
        lines.append(
            f"| {name} | {spread(one['s_per_item'], 2)} | {spread(one['ratio_to_latent'], 1)} | {spread(one['ratio_to_direct'], 1)} |"
        )
    return "\n".join(lines) + "\n"


def draw(main: dict[str, Any], folder: Path) -> None:
    """`micro.svg`, the arms of the main table, and `world.png`, a clip and its thought video."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "storm"}):
        dots(main).savefig(folder / "micro.svg", metadata={"Date": None})
    scene, question = next(iter(sample_reasoning(random.Random(4), REASONING, 1, HORIZON)))
    gap = np.full((128, 10, 3), 255, np.uint8)
    shown = clip_frames(scene)[1::2]
    unseen = thought_frames(scene, question.steps, question.steps + 1)[3::2]
    Image.fromarray(np.concatenate([*shown, gap, *unseen], 1)).save(folder / "world.png")


SECTIONS = {
    "results": (results, "reproduce"),
    "latency": (latency, "latency"),
}


def recorded(name: str) -> dict[str, Any]:
    return read_tables((ROOT / "docs" / "results" / f"{name}.json").read_text())


def main() -> None:
    readme = ROOT / "README.md"
    text = wanted = readme.read_text()
    for name, (write, record) in SECTIONS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = wanted.split(start)
        wanted = head + start + write(recorded(record)) + end + rest.split(end)[1]
    if "--check" in sys.argv:
        sys.exit(
            "README.md is not what docs/results says: run dev/tables.py" if wanted != text else 0
        )
    readme.write_text(wanted)
    draw(recorded("reproduce")["tables"]["main"], ROOT / "docs/images")


if __name__ == "__main__":
    main()
