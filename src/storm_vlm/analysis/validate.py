"""The validity suite: states once, every replacement of them answered by the evaluation runner, probes, and the page.

The folder is a run of the evaluation, which a killed call goes on with, and which `storm report` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from storm_vlm.analysis import AnalysisError
from storm_vlm.analysis.embeddings import Embeddings, nearness, project
from storm_vlm.analysis.page import Analysis, card, write_page
from storm_vlm.analysis.probes import probe
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
    donors,
    fed_answers,
    input_sensitivity,
    outcomes,
    own_latents,
    reliance_of,
    replacements,
    rolled_out,
    slot_accuracy,
    slot_kinds,
)
from storm_vlm.analysis.retrieval import retrieval
from storm_vlm.analysis.states import States, extract, kept_batches
from storm_vlm.data.answer import is_correct
from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.check import check_videos, sound_rows, tell_faults
from storm_vlm.data.output import exclusive, refuse_input
from storm_vlm.data.prompt import question_text
from storm_vlm.data.row import Row, scan_rows
from storm_vlm.data.video import read_video
from storm_vlm.evaluation.question_set import QuestionSet
from storm_vlm.evaluation.run_folder import RELIANCE
from storm_vlm.evaluation.runner import distributed, run
from storm_vlm.evaluation.verdict import verdict
from storm_vlm.inference.frames import Frames, QuestionLike
from storm_vlm.inference.local_chat import model_settings
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.inference.reply import Reply
from storm_vlm.training.row_lengths import long_rows
from storm_vlm.versions import commit, versions

PARTS = tuple(field.name for field in fields(Analysis))
VALIDITY = "validity.json"
EXAMPLES = 3  # right ones, and as many wrong ones


class Replacement(Reasoner):
    """Answers a row once for each kind of slots, (N, n, D) in the rows' order; `Reply.text` is the own latents'."""

    def __init__(
        self, pipeline: StormPipeline, rows: Sequence[Row], slots: Mapping[str, Tensor | None]
    ) -> None:
        super().__init__(Frames(pipeline.collator.videos.num_frames))
        self.pipeline, self.slots = pipeline, slots
        self.place = {row.id: number for number, row in enumerate(rows)}

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "replaced": list(self.slots),
            "max_new_tokens": self.max_new_tokens,
            "latent_budget": self.pipeline.collator.latent_budget,
            **model_settings(self.pipeline.model, self.pipeline.processor),
        }

    def prompt(self, question: QuestionLike) -> str:
        return question_text(question.question, question.options)

    def answer(self, questions: Sequence[Any]) -> list[Reply]:
        places = [self.place[row.id] for row in questions]
        slots = {kind: None if s is None else s[places] for kind, s in self.slots.items()}
        texts = fed_answers(self.pipeline, questions, slots)
        replies = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
        return [Reply(fed["own"], fed=fed) for fed in replies]


def validate(
    checkpoint: str,
    rows_file: Path,
    out: Path,
    limit: int | None = None,
    retrieval_file: Path | None = None,
    decoder_file: Path | None = None,
    batch_size: int = 32,
    max_errors: float = 1.0,
) -> Analysis | None:
    """Write the page (`report.html`), its figures (`validity.json`) and the table of `storm report` into `out`.

    Of several processes, the first does this, and the others return None.

    Raises what `extract` and `donors` raise, RowError, RunError and OutputError.
    """
    refuse_input(out, [Path(checkpoint).expanduser()])
    for file in filter(None, (rows_file, retrieval_file, decoder_file)):
        if not scan_rows(file)[0]:
            sound_rows(file, None)  # raises, before the model is loaded, which takes longer
    with exclusive(out):
        return _validate(
            checkpoint, rows_file, out, limit, retrieval_file, decoder_file, batch_size, max_errors
        )


def _validate(
    checkpoint: str,
    rows_file: Path,
    out: Path,
    limit: int | None,
    retrieval_file: Path | None,
    decoder_file: Path | None,
    batch_size: int,
    max_errors: float,
) -> Analysis | None:
    here = distributed()
    pipeline = StormPipeline.from_pretrained(checkpoint, device=str(here.device))
    batches = kept_batches(pipeline, out, checkpoint, batch_size)
    rows = _readable_rows(rows_file, pipeline, max_errors, limit)
    given = donors(rows) if rows else None
    states = extract(pipeline, rows, batches)
    assert given  # `extract` refuses no rows
    sensitivity = input_sensitivity(pipeline, rows, states.latents, batches)
    training = _readable_rows(decoder_file, pipeline, max_errors) if decoder_file else []
    drawable = [row for row in training if row.thought_video is not None]
    taught = rolled_out(pipeline, drawable, batches) if drawable else states.latents[:0]
    probed, probed_states = rows, states
    if retrieval_file is not None:
        probed = _readable_rows(retrieval_file, pipeline, max_errors)
        probed_states = extract(pipeline, probed, batches)
    targets = states.visual(states.targets) if bool(states.has_target.any()) else None
    own = own_latents(pipeline, states.latents, batch_size)
    slots = replacements(pipeline, own, given, targets)
    slots |= slot_kinds(own, states.latents, states.further)
    reasoner = Replacement(pipeline, rows, slots)
    said = {"model": checkpoint, "reasoner": "replacement", "weights": batches.made_from["weights"]}
    done = run(out, reasoner, QuestionSet(rows, reasoner.frames), said, batch_size)
    if not here.is_main_process:
        return None
    if lost := [record for record in done.records if record.error]:
        raise AnalysisError(f"{lost[0].id} could not be asked ({lost[0].error}): remove the row")
    answers = {kind: [r.reply.fed[kind] for r in done.records if r.reply] for kind in slots}
    tampered = outcomes(rows, answers, given, states.has_target.tolist())
    reliance = reliance_of(rows, tampered, states.latents.shape[1], sensitivity)
    decoder, held_out = _decoder(rows, states, drawable, taught, decoder_file is not None)
    probes = probe(states, rows, [bool(right) for right in tampered.right["own"]])
    analysis = Analysis(
        verdict=verdict(reliance, probes),
        reliance=reliance,
        probes=probes,
        slots=slot_accuracy(rows, answers),
        embeddings=Embeddings(project(states, rows), nearness(states, rows)),
        retrieval=retrieval(probed_states, probed),
        watch=Readouts(
            _quality(pipeline, rows, states, decoder, held_out),
            lens_accuracy(pipeline, rows, states.latents),
        ),
    )
    about = {
        "checkpoint": Path(checkpoint).name if Path(checkpoint).is_absolute() else checkpoint,
        "file": rows_file.name,
        **{key: done.provenance[key] for key in ("weights", "rows")},
        "n": len(rows),
        "commit": commit(),
        "versions": versions(),
    }
    write_json(out / RELIANCE, {**about, **asdict(reliance)})
    chosen = _chosen(rows, answers["own"], held_out)
    cards = [card(pipeline, rows[i], answers["own"][i], states, i, decoder) for i in chosen]
    write_json(out / "examples.json", cards)
    write_json(out / VALIDITY, {"about": about, **vars(analysis)})
    write_page(out / "report.html", about, analysis, cards)
    return analysis


def _readable_rows(
    file: Path, pipeline: StormPipeline, max_errors: float, limit: int | None = None
) -> list[Row]:
    """The rows whose clips can be decoded, and whose prompts the model can read; the others are named."""
    num_frames = pipeline.collator.videos.num_frames

    def check(row: Row) -> None:
        check_videos(row)
        read_video(row.video, num_frames, row.start, row.end)
        if (thought := row.thought_video) is not None:
            read_video(thought.path, num_frames, thought.start, thought.end)

    rows = sound_rows(file, check, max_errors, limit)
    faults = long_rows(rows, pipeline.collator, pipeline.model.config)
    tell_faults(faults, len(rows), file, max_errors)
    return [row for row in rows if row.id not in faults]


def read_analysis(folder: Path) -> Analysis:
    """What `validate` wrote into the folder."""
    parts = json.loads((folder / VALIDITY).read_bytes())
    return TypeAdapter(Analysis).validate_python({part: parts[part] for part in PARTS})


def _decoder(
    rows: Sequence[Row], states: States, training: Sequence[Row], taught: Tensor, given: bool
) -> tuple[Decoder | None, list[int]]:
    """A decoder, and the rows that it was not trained on and that have a thought video.

    It is trained on the rows `training`, whose latents are `taught`; if none are `given`, on half of the videos.
    """
    drawable = [i for i, row in enumerate(rows) if row.thought_video is not None]
    if given:
        shared = {row.video for row in training}
    else:
        shared = set(list(dict.fromkeys(rows[i].video for i in drawable))[1::2])
        used = [i for i in drawable if rows[i].video in shared]
        training, taught = [rows[i] for i in used], states.latents[used]
    held_out = [i for i in drawable if rows[i].video not in shared]
    if not training or not held_out:
        return None, []
    return train_decoder(taught, thought_frames(training, taught.shape[1])), held_out


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
