"""All of an analysis: states once, then each part into a small file of its own, then the page."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from pydantic import TypeAdapter

from storm_vlm.analysis.embeddings import Embeddings, nearness, project
from storm_vlm.analysis.page import Analysis, card, write_page
from storm_vlm.analysis.readouts import (
    Decoder,
    DrawingQuality,
    Readouts,
    decoding_quality,
    last_frames,
    lens_accuracy,
    thought_frames,
    train_decoder,
)
from storm_vlm.analysis.reliance import (
    fed_answers,
    latent_reliance,
    rolled_out,
    slot_accuracy,
)
from storm_vlm.analysis.retrieval import retrieval
from storm_vlm.analysis.states import States, extract
from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.check import check_videos, fault_lines, row_faults
from storm_vlm.data.output import check_outputs, exclusive, refuse_input
from storm_vlm.data.prompt import is_correct
from storm_vlm.data.row import Row, read_rows
from storm_vlm.data.video import read_video
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.versions import commit, versions

log = logging.getLogger(__name__)
PARTS = tuple(field.name for field in fields(Analysis))
EXAMPLES = 3  # right ones, and as many wrong ones


def analyze(
    checkpoint: str,
    rows_file: Path,
    out: Path,
    limit: int | None = None,
    retrieval_file: Path | None = None,
    decoder_file: Path | None = None,
    batch_size: int = 32,
    results: Path | None = None,
) -> Analysis:
    """Write the page (`report.html`) and what it is made of into `out`: a file for each part, and `examples.json`.

    Raises what `extract` and `latent_reliance` raise, RowError, and OutputError.
    """
    read = [checkpoint, rows_file, retrieval_file, decoder_file]
    refuse_input(out, [Path(checkpoint).expanduser()])
    check_outputs([results], read)
    for file in filter(None, (rows_file, retrieval_file, decoder_file)):
        read_rows(file)  # raises before the model is loaded, which takes longer
    with exclusive(out):
        return _analyze(
            checkpoint, rows_file, out, limit, retrieval_file, decoder_file, batch_size, results
        )


def _analyze(
    checkpoint: str,
    rows_file: Path,
    out: Path,
    limit: int | None,
    retrieval_file: Path | None,
    decoder_file: Path | None,
    batch_size: int,
    results: Path | None,
) -> Analysis:
    pipeline = StormPipeline.from_pretrained(checkpoint)
    rows = _readable_rows(rows_file, pipeline, limit)
    states = extract(pipeline, rows, out, checkpoint, batch_size)
    about = {
        "checkpoint": Path(checkpoint).name if Path(checkpoint).is_absolute() else checkpoint,
        "rows": rows_file.name,
        "n": len(rows),
        "commit": commit(),
        "versions": versions(),
    }
    probed, probed_states = rows, states
    if retrieval_file is not None:
        probed = _readable_rows(retrieval_file, pipeline)
        probed_states = extract(pipeline, probed, out / "retrieval", checkpoint, batch_size)
    decoder, held_out = _decoder(pipeline, rows, states, decoder_file, batch_size)
    analysis = Analysis(
        reliance=latent_reliance(pipeline, rows, states.latents, batch_size),
        slots=slot_accuracy(pipeline, rows, states.latents, states.further, batch_size),
        embeddings=Embeddings(project(states, rows), nearness(states, rows)),
        retrieval=retrieval(probed_states, probed),
        watch=Readouts(
            _quality(pipeline, rows, states, decoder, held_out),
            lens_accuracy(pipeline, rows, states.latents),
        ),
    )
    for part in PARTS:
        write_json(out / f"{part}.json", {**about, part: getattr(analysis, part)})
    if results is not None:
        command = f"storm analyze {about['checkpoint']} {rows_file.name}"
        write_json(results, {"command": command, **about, **asdict(analysis.reliance)})
    answers = fed_answers(pipeline, rows, {"own": states.latents}, batch_size)["own"]
    chosen = _chosen(rows, answers, held_out)
    cards = [card(pipeline, rows[i], answers[i], states, i, decoder) for i in chosen]
    write_json(out / "examples.json", cards)
    write_page(out / "report.html", about, analysis, cards)
    return analysis


def _readable_rows(file: Path, pipeline: StormPipeline, limit: int | None = None) -> list[Row]:
    """The rows whose clips can be decoded; the others are named."""
    num_frames = pipeline.collator.videos.num_frames

    def check(row: Row) -> None:
        check_videos(row)
        read_video(row.video, num_frames, row.start, row.end)
        if (thought := row.thought_video) is not None:
            read_video(thought.path, num_frames, thought.start, thought.end)

    rows = read_rows(file)[:limit]
    if faults := row_faults(rows, check):
        named = fault_lines(faults, file)
        log.warning("%d of %d rows are left out:\n%s", len(faults), len(rows), named)
    return [row for row in rows if row.id not in faults]


def read_analysis(folder: Path) -> Analysis:
    """What `analyze` wrote into the folder."""
    parts = {part: json.loads((folder / f"{part}.json").read_bytes())[part] for part in PARTS}
    return TypeAdapter(Analysis).validate_python(parts)


def _decoder(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    states: States,
    file: Path | None,
    batch_size: int,
) -> tuple[Decoder | None, list[int]]:
    """A decoder, and the rows that it was not trained on and that have a thought video."""
    drawable = [i for i, row in enumerate(rows) if row.thought_video is not None]
    if file is not None:
        training = [r for r in _readable_rows(file, pipeline) if r.thought_video is not None]
        latents = rolled_out(pipeline, training, batch_size) if training else states.latents[:0]
        shared = {row.video for row in training}
        held_out = [i for i in drawable if rows[i].video not in shared]
    else:
        videos = list(dict.fromkeys(rows[i].video for i in drawable))
        seen = set(videos[1::2])
        used = [i for i in drawable if rows[i].video in seen]
        held_out = [i for i in drawable if rows[i].video not in seen]
        training, latents = [rows[i] for i in used], states.latents[used]
    if not training or not held_out:
        return None, []
    return train_decoder(latents, thought_frames(training, latents.shape[1])), held_out


def _quality(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    states: States,
    decoder: Decoder | None,
    held_out: list[int],
) -> DrawingQuality | None:
    if decoder is None:
        return None
    drawn = [rows[i] for i in held_out]
    frames = thought_frames(drawn, states.latents.shape[1])
    last = last_frames(drawn, pipeline.collator.videos.num_frames)
    return decoding_quality(decoder, states.latents[held_out], frames, last, drawn)


def _chosen(rows: Sequence[Row], answers: Sequence[str], held_out: Sequence[int]) -> list[int]:
    """The first right and the first wrong rows, of those that the decoder was not trained on."""
    places = held_out or range(len(rows))
    right = {i: bool(is_correct(answers[i], rows[i])) for i in places}
    kinds = ([i for i in places if right[i] == kind] for kind in (True, False))
    return [i for kind in kinds for i in kind[:EXAMPLES]]
