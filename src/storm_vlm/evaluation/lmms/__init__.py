"""Rows as a task of lmms-eval: a folder with the rows, a YAML file, and the functions that it names."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from storm_vlm.data.atomic_write import write_text
from storm_vlm.data.prompt import question_text
from storm_vlm.evaluation.question_set import QuestionSet


def write_task(folder: Path, name: str, questions: QuestionSet) -> str:
    """Write the task into `folder`, for `--include_path`; returns its name there, `storm_<name>`."""
    task = "storm_" + re.sub(r"\W+", "_", name.lower())
    lines = []
    for row in questions.rows:
        if row.id in questions.faults:
            continue
        question = questions.question(row)
        text = question_text(question.question, question.options)
        window = {"video": row.video, "start": row.start, "end": row.end}
        doc = {"id": row.id, **window, "text": text, "answer": row.answer}
        # One column for the rest: what rows say in `meta` need not be alike.
        lines.append(json.dumps({**doc, "row": row.model_dump_json()}) + "\n")
    write_text(folder / f"{task}.jsonl", "".join(lines))
    here = resources.files(__name__)
    template = here.joinpath("task.yaml").read_text(encoding="utf-8")
    write_text(folder / f"{task}.yaml", template.replace("TASK", task))
    write_text(
        folder / "storm_functions.py", here.joinpath("functions.py").read_text(encoding="utf-8")
    )
    return task
