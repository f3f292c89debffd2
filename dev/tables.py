"""Write the tables and pictures of README and docs from docs/results/*.json: `python dev/tables.py` (`--check` compares)."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from storm_vlm.lab.reproduce.comparison_table import read_tables
from storm_vlm.lab.reproduce.evidence_charts import dots
from storm_vlm.lab.world.mirrors import HORIZON
from storm_vlm.lab.world.questions import sample_reasoning
from storm_vlm.lab.world.render import clip_frames, thought_frames
from storm_vlm.lab.world.simulator import REASONING

ROOT = Path(__file__).resolve().parent.parent


ROWS = {  # of README's table: the arms of docs/results/controls, and what a newcomer would call them
    "storm": "**STORM**, Stage I then II",
    "cot": "chain of thought, taught with the oracle's plans",
    "sft_compute": "SFT, for as many FLOPs",
    "sft": "SFT, for as many steps",
}


def results(found: dict[str, Any]) -> str:
    """README's table, in Markdown."""
    lines = [
        "| trained on the same rows, at its best learning rate | right answers | with another clip's latents | tokens written |",
        "|---|---|---|---|",
    ]
    for arm, name in ROWS.items():
        one = found[arm]
        right = f"{percent(one['accuracy'])} ({percent(one['accuracy'], 'low')} to {percent(one['accuracy'], 'high')})"
        swapped = f"{fmean(one['swapped']):.1%}" if one["swapped"] else ""
        lines.append(f"| {name} | {right} | {swapped} | {one['tokens']:.0f} |")
    return "\n".join(lines) + "\n"


def charted(found: dict[str, Any]) -> dict[str, Any]:
    """The same arms as `dots` wants them."""
    lines = []
    for arm, name in ROWS.items():
        one = found[arm]
        swap = (
            {"swap_other_answer": SimpleNamespace(mean=fmean(one["swapped"]))}
            if one["swapped"]
            else None
        )
        lines.append({**one, "name": name.replace("*", ""), "tampered": swap})
    return {"lines": lines}


def percent(estimate: Any, field: str = "mean") -> str:
    return f"{getattr(estimate, field):.1%}"


def latency(found: dict[str, Any]) -> str:
    """Seconds an item of each reasoner, as a table."""
    run = found["micro cpu"]
    lines = [
        f"What does a way to reason cost? Micro model, {run['threads']} CPU thread, lengths fixed (answer {run['lengths']['answer']} tokens, chain of thought {run['lengths']['cot']}, "
        f"grounded {run['lengths']['grounded_cot']}, {run['lengths']['tool_rounds']} tool rounds of {run['lengths']['tool_tokens']}); median of {run['rounds']} rounds of {run['items']} items and their range, on {run['cores']} cores with a load of {run['load']:.0f}. At 7B on a GPU: {found['7b cuda']} ([figures](results/latency.json), `storm bench infer`; another run than the one in [Results](results.md)):",
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
            f"| {name} | {spread(one['s_per_item'], 3)} | {spread(one['ratio_to_latent'], 1)} | {spread(one['ratio_to_direct'], 1)} |"
        )
    return "\n".join(lines) + "\n"


def serving(found: dict[str, Any]) -> str:
    """What an answer of the server costs, and what became of a flood."""
    soak = found["soak"]
    told, memory = soak["outcomes"], soak["memory_mib"]
    lines = [
        f"On two cores, which the clients used, too ([figures](results/serving.json)), the micro model: of {sum(soak['clients'].values()):,} clients in {soak['seconds']:.0f} s, "
        f"{told['200']:,} were answered, {told['429']:,} were told to come later, {told['refused']:,} had brought a broken video, {told['left']:,} left, and {soak['lost'] or 'none'} was lost. "
        f"{soak['readers_killed']} readers were killed; the server held {memory[0]:.0f} MiB in the first quarter of the time and {memory[-1]:.0f} in the last.",
        "",
        "| questions at a time | CPU ms an answer, server | pipeline | ratio |",
        "|---|---|---|---|",
    ]
    for cost in found["costs"]:
        served, direct = 1000 * cost["served_cpu"], 1000 * cost["pipeline_cpu"]
        lines.append(
            f"| {cost['concurrency']} | {served:.1f} | {direct:.1f} | {cost['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def vllm(found: dict[str, Any]) -> str:
    """Answers a second of CPU, vLLM beside the pipeline."""
    run = found["vllm"]
    versions = ", ".join(
        f"{name} {run['versions'][name]}" for name in ("vllm", "transformers", "torch")
    )
    lines = [
        f"Answers a second of CPU, one thread, float32, micro model, decoded clips prepared every time, all in one process ([figures](results/serving.json), `storm bench vllm`; {versions}). "
        f"Stock `generate` makes the {run['passes']} forward passes of an answer with slots:",
        "",
        "| questions at a time | vLLM, slots | pipeline, slots | ratio | vLLM, off | pipeline, off | ratio | stock `generate` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in run["throughput"]:
        cells = [
            f"{one[name]:.2f}" if "ratio" in name else f"{one[name]:.0f}"
            for name in (
                "vllm",
                "pipeline",
                "ratio",
                "vllm_off",
                "pipeline_off",
                "ratio_off",
                "stock_generate",
            )
        ]
        lines.append(f"| {one['concurrency']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(main: dict[str, Any], folder: Path) -> None:
    """`micro.svg`, the arms of README's table, and `world.png`, a clip and its thought video."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "storm"}):
        dots(main).savefig(folder / "micro.svg", metadata={"Date": None})
    scene, question = next(iter(sample_reasoning(random.Random(4), REASONING, 1, HORIZON)))
    gap = np.full((128, 10, 3), 255, np.uint8)
    shown = clip_frames(scene)[1::2]
    unseen = thought_frames(scene, question.steps, question.steps + 1)[3::2]
    Image.fromarray(np.concatenate([*shown, gap, *unseen], 1)).save(folder / "world.png")


SECTIONS = {  # what is written between marks of that name, from which record, in which file
    "results": (results, "controls/controls", ROOT / "README.md"),
    "latency": (latency, "latency", ROOT / "docs" / "evaluate.md"),
    "serving": (serving, "serving", ROOT / "docs" / "serving.md"),
    "vllm": (vllm, "serving", ROOT / "docs" / "serving.md"),
}


def recorded(name: str) -> dict[str, Any]:
    return read_tables((ROOT / "docs" / "results" / f"{name}.json").read_text())


def main() -> None:
    for name, (write, record, file) in SECTIONS.items():
        text = file.read_text()
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(start)
        wanted = head + start + write(recorded(record)) + end + rest.split(end)[1]
        if "--check" not in sys.argv:
            file.write_text(wanted)
        elif wanted != text:
            sys.exit(f"{file.name} is not what docs/results says: run dev/tables.py")
    if "--check" not in sys.argv:
        draw(charted(recorded("controls/controls")), ROOT / "docs/images")


if __name__ == "__main__":
    main()
