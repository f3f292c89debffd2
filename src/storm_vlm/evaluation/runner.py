"""A run folder: every row asked and kept, by one process or several, and gone on with after a kill.

It holds `run.json` (what was asked, of what, how; at last the summary) and, for each process, `answers-<rank>.jsonl`,
one `Record` a line, written batch by batch and at last put in the rows' order. Rows that could not be asked are asked
again by the next call.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Set
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from storm_vlm.data.atomic_write import write_json, write_text
from storm_vlm.data.identity import clip_identity
from storm_vlm.data.output import exclusive
from storm_vlm.evaluation.question_set import QuestionSet, answer_rows
from storm_vlm.evaluation.run_folder import (
    Run,
    RunError,
    read_provenance,
    read_record,
    read_records,
)
from storm_vlm.evaluation.summary import summarize
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.versions import commit, versions

log = logging.getLogger(__name__)
PATIENCE = timedelta(days=7)  # of a process that is done, for those that are not


def run(
    folder: Path,
    reasoner: Reasoner,
    questions: QuestionSet,
    settings: dict[str, Any],
    batch_size: int,
    readers: int = 0,
) -> Run:
    """All rows, shared between the processes that Accelerate started; the records are in the rows' order.

    `settings`: all else that decides the answers. `readers`: processes that read clips ahead, beside each of these.

    Raises:
        RunError: the folder holds answers to other questions, of other settings, or about other clips; or some were
            lost on the way.
        OutputError: another process is at work on it.
    """
    with exclusive(folder):
        state, began = distributed(), time.perf_counter()
        description = _begin(folder, reasoner, questions, settings, batch_size, state)
        state.wait_for_everyone()  # the folder is in order
        done = {record.id for record in read_records(folder)}
        if done and state.is_main_process:
            log.info(
                "%s: %d of %d answers were there already", folder, len(done), len(questions.rows)
            )
        state.wait_for_everyone()  # all know what is left
        clips = questions.by_length([row for row in questions.rows if row.id not in done])
        left = [row for clip in clips[state.process_index :: state.num_processes] for row in clip]
        watched = [row for row in left if questions.shows_video and row.id not in questions.faults]
        answers, asking, busy = (
            folder / f"answers-{state.process_index}.jsonl",
            time.perf_counter(),
            0.0,
        )
        with (
            answers.open("a", encoding="utf-8") as file,
            reasoner.frames.ahead(watched, readers, batch_size),
        ):
            bar = tqdm(total=len(left), desc="rows", disable=not state.is_main_process)
            for records in answer_rows(reasoner, questions, left, batch_size):
                file.writelines(json.dumps(asdict(r)) + "\n" for r in records)
                file.flush()
                bar.update(len(records))
                spent = [record.reply.seconds for record in records if record.reply]
                busy += sum(s.get("total", 0.0) - s.get("decode", 0.0) for s in spent)
        share = busy / (time.perf_counter() - asking)
        if state.is_main_process and busy:  # an endpoint does not say
            log.info("the model was at work %.0f%% of the time", 100 * share)
        place = {row.id: number for number, row in enumerate(questions.rows)}
        lines = answers.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(answers, "".join(sorted(lines, key=lambda line: place[json.loads(line)["id"]])))
        state.wait_for_everyone()
        records = sorted(read_records(folder), key=lambda record: place[record.id])
        if len(records) < len(questions.rows):
            raise RunError(
                f"{folder} holds {len(records)} of {len(questions.rows)} answers, though all were written: see "
                "what else changes its files, and run again"
            )
        finished = Run(folder, description, tuple(records))
        if state.is_main_process:
            description |= {
                "seconds": time.perf_counter() - began,
                "busy": share or None,
                "summary": asdict(summarize(finished)),
            }
            write_json(folder / "run.json", description)
        return finished


def distributed() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; the only one otherwise."""
    cpu = not torch.cuda.is_available()  # else Accelerate takes each process for the only one
    return PartialState(cpu, **({"timeout": PATIENCE} if "RANK" in os.environ else {}))


def _begin(
    folder: Path,
    reasoner: Reasoner,
    questions: QuestionSet,
    settings: dict[str, Any],
    batch_size: int,
    state: PartialState,
) -> dict[str, Any]:
    """Check that the folder is this run's, and put it in order; returns what `run.json` says."""
    settings = {
        "benchmark": questions.benchmark.name if questions.benchmark else "rows",
        **settings,
        "rows": questions.fingerprint(),
        "control": questions.control,
        "prompt": questions.prompt,
        "num_frames": questions.frames.num_frames,
        **reasoner.settings,
    }
    settings = json.loads(json.dumps(settings))  # as it will be read again
    first = next(row for row in questions.rows if row.id not in questions.faults)
    description = {
        **settings,
        "first_prompt": reasoner.prompt(questions.question(questions.controlled_row(first))),
        "draws": "controls are drawn by each row's id",
        "n_expected": questions.count,
        "batch_size": batch_size,
        "processes": state.num_processes,
        "device": str(state.device),
        "versions": versions(),
        "commit": commit(),
    }
    if state.is_main_process:
        if _answered(folder):
            _check_same(folder, settings)
        for file in folder.glob("answers-*.jsonl"):
            _mend(file, {row.id for row in questions.rows})
        _check_clips(folder, questions)
        write_json(folder / "run.json", description)
    return description


def _answered(folder: Path) -> bool:
    """Whether a row was answered: a first start that failed does not make the folder its own."""
    return any(b'"error": null' in file.read_bytes() for file in folder.glob("answers-*.jsonl"))


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    theirs = read_provenance(folder)
    if changed := sorted(key for key in settings if settings[key] != theirs.get(key)):
        raise RunError(
            f"{folder} holds answers of other {', '.join(changed)}: remove it, or choose another --out"
        )


def _check_clips(folder: Path, questions: QuestionSet) -> None:
    """A clip that is gone since its row was answered is no other clip."""
    videos = {row.id: row.video for row in questions.rows}
    for record in read_records(folder):
        if record.clip and clip_identity(videos[record.id]) not in (None, record.clip):
            raise RunError(
                f"{folder} holds answers about other clips ({videos[record.id]} has changed since): remove it, or "
                "choose another --out"
            )


def _mend(file: Path, ids: Set[str]) -> None:
    """Cut off what a kill or a power cut left of a last line, and rows that could not be asked: they are due again.

    Raises RunError for a line of something else, which is not ours to remove.
    """
    *whole, _ = file.read_bytes().split(b"\n")
    lines = {number: line.strip(b"\0") for number, line in enumerate(whole, start=1)}
    records = {n: read_record(line, f"{file}:{n}") for n, line in lines.items() if line.strip()}
    for number, record in records.items():
        if record.error is None and record.id not in ids:
            raise RunError(f"{file}:{number}: {record.id!r} is no row of this run: remove the line")
    kept = [lines[number] + b"\n" for number, record in records.items() if record.error is None]
    write_text(file, b"".join(kept).decode())
