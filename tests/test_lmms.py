"""lmms-eval itself, offline, says what our own evaluation says.

It wants an environment of its own (its PyAV pin contradicts ours), which `make test-extras` makes.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from storm_vlm import StormPipeline
from storm_vlm.data.row import Row, write_rows
from storm_vlm.evaluation.lmms import write_task
from storm_vlm.evaluation.question_set import QuestionSet, evaluate
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.reasoners import build_reasoner
from storm_vlm.lab.checkpoints import shipped

PYTHON = os.environ.get("STORM_LMMS_PYTHON", "")
needs_lmms = pytest.mark.skipif(
    not PYTHON, reason="set STORM_LMMS_PYTHON to the Python of an environment with lmms-eval"
)
FRAMES = Frames(6)


@pytest.fixture(scope="module")
def rows(reasoning_rows) -> list[Row]:
    """Eleven, so that two processes get unequal shares; some with options, one with a window."""
    answers = sorted({row.answer for row in reasoning_rows})
    choices = [r.model_copy(update={"options": tuple(answers)}) for r in reasoning_rows[:4]]
    return [
        *choices,
        reasoning_rows[4].model_copy(update={"end": 0.9, "keyframes": ()}),
        *reasoning_rows[5:11],
    ]


@pytest.fixture(scope="module")
def task(rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_rows(folder / "rows.jsonl", rows)
    questions = QuestionSet.read(folder / "rows.jsonl", None, None, frames=FRAMES)
    assert write_task(folder, "micro world", questions) == "storm_micro_world"
    return folder


def test_a_task_holds_the_rows_as_they_are_put(task, rows) -> None:
    docs = [json.loads(line) for line in (task / "storm_micro_world.jsonl").open()]
    assert [doc["id"] for doc in docs] == [row.id for row in rows]
    assert docs[0]["text"].endswith("Answer with the option's letter.")
    assert [Row.model_validate_json(doc["row"]).answer for doc in docs] == [r.answer for r in rows]


def lmms_eval(task: Path, out: Path, arguments: str, processes: int = 1) -> Any:
    command = [PYTHON, "-m", "lmms_eval", "--model", "storm"]
    if processes > 1:
        several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command[2:2] = [*several, "-m"]
    command += ["--model_args", arguments, "--include_path", str(task), "--batch_size", "4"]
    command += ["--tasks", "storm_micro_world", "--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment.pop("PYTHONPATH", None)  # that of this environment
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=out
    )
    # It ends with 0 whatever happened: only its files tell.
    assert list(out.rglob("*_results.json")), done.stderr[-4000:]
    (results,), (samples,) = out.rglob("*_results.json"), out.rglob("*_samples_*.jsonl")
    found = json.loads(results.read_text())["results"]["storm_micro_world"]
    said = sorted(map(json.loads, samples.open()), key=lambda sample: sample["doc_id"])
    return found, said


@needs_lmms
@pytest.mark.parametrize(
    ("checkpoint", "reasoner", "processes"), [("storm", "latent", 2), ("backbone", "direct", 1)]
)
def test_lmms_eval_says_the_same(task, rows, tmp_path, checkpoint, reasoner, processes) -> None:
    path = str(shipped(checkpoint))
    arguments = f"pretrained={path},reasoner={reasoner}"
    found, said = lmms_eval(task, tmp_path, arguments, processes)
    pipeline = StormPipeline.from_pretrained(path)
    ours = evaluate(build_reasoner(reasoner, pipeline, FRAMES), rows, FRAMES)
    replies = [record.reply for record in ours if record.reply]
    assert [sample["doc_id"] for sample in said] == list(range(len(rows)))
    assert [sample["filtered_resps"] for sample in said] == [reply.text for reply in replies]
    assert [s["accuracy"]["score"] for s in said] == [float(record.correct) for record in ours]
    tokens = [sample["token_counts"][0]["output_tokens"] for sample in said]
    assert tokens == [reply.tokens for reply in replies]
    assert found["accuracy,none"] == pytest.approx(sum(r.correct for r in ours) / len(rows))
    assert found["unparsed,none"] == pytest.approx(sum(not r.parsed for r in ours) / len(rows))
