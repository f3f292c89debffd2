"""What several questions about one clip save: asked together against asked as if each had a clip of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.collator import Question
from storm_vlm.data.row import Row, read_rows
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.bench.infer import random_pipeline, synthetic_row
from storm_vlm.lab.bench.training_step import Shape, machine, shape_config, spread
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world

ANSWER_TOKENS = 8
ASKED = (
    "Which way does the pattern move?",
    "What moves?",
    "How fast is it?",
    "Does it turn round?",
)


def bench_questions(
    shape: Shape,
    device: str,
    clips: int,
    questions: int,
    batch_size: int,
    rounds: int,
    results: Path | None,
) -> dict[str, Any]:
    """Items a second of both ways, in turn, round after round; a first round warms up.

    Args:
        shape: `micro`, the shipped model on clips of its world; else a published size with random weights (bf16) on
            a synthetic clip of half a minute.
        questions: about each clip, at most four.
        batch_size: rows at a time, in both ways.
        results: JSON file for the record.

    Returns:
        ``items_per_s`` of `together` and `apart`, and their ``ratio``, as median, low and high over rounds;
        ``same_answers``: how many of ``items`` were answered alike, to the token.
    """
    with TemporaryDirectory() as folder:
        if shape == "micro":
            pipeline = StormPipeline.from_pretrained(str(shipped("storm")), device=device)
            rows = read_rows(build_world(folder, "reasoning", "test", clips, questions=questions))
        else:
            pipeline = random_pipeline(shape_config(shape), 8, device, torch.bfloat16)
            row = synthetic_row(Path(folder))
            rows = [
                row.model_copy(update={"question": asked, "end": 30.0 + clip})
                for clip in range(clips)
                for asked in ASKED[:questions]
            ]
        ways = {"together": together, "apart": apart}
        spent: dict[str, list[float]] = {name: [] for name in ways}
        said: dict[str, list[Any]] = {}
        for number in tqdm(range(rounds + 1), "rounds", leave=False):
            for name, way in ways.items():
                began = time.perf_counter()
                said[name] = _answers(pipeline, way, rows, batch_size)
                if number:  # the first warms up
                    spent[name].append(time.perf_counter() - began)
    alike = sum(a == b for a, b in zip(said["together"], said["apart"], strict=True))
    record = {
        "shape": shape,
        **machine(device),
        **{"items": len(rows), "questions": questions, "batch_size": batch_size, "rounds": rounds},
        "items_per_s": {n: spread([len(rows) / s for s in spent[n]]) for n in ways},
        "ratio": spread([b / a for a, b in zip(spent["together"], spent["apart"], strict=True)]),
        "same_answers": alike,
    }
    if results is not None:
        known = json.loads(results.read_text()) if results.exists() else {}
        write_json(results, {**known, f"{shape} {device}": record})
    return record


def together(frames: Frames, row: Row) -> Question:
    """As an evaluation asks: the clip is read once."""
    return Question(frames.read(row), row.question, row.options)


def apart(frames: Frames, row: Row) -> Question:
    """With a clip of its own."""
    clip = frames.window(row.video, frames.num_frames, row.start, row.end)
    return Question(clip, row.question, row.options)


def _answers(
    pipeline: StormPipeline,
    way: Callable[[Frames, Row], Question],
    rows: Sequence[Row],
    batch_size: int,
) -> list[Any]:
    frames, said = Frames(pipeline.collator.videos.num_frames), []
    for first in range(0, len(rows), batch_size):
        asked = [way(frames, row) for row in rows[first : first + batch_size]]
        said += pipeline.answer_batch(asked, ANSWER_TOKENS)
    return [replace(answer, seconds={}) for answer in said]
