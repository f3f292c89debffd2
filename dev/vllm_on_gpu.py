"""What only a GPU can show of the vLLM plugin: CUDA graphs, FlashAttention's metadata, asynchronous scheduling.

    PYTHONPATH=src:tests python dev/vllm_on_gpu.py OUT.json

Tokens of the micro model with graphs and with preemptions, against the same engine without either, and against our
`generate`; all in bfloat16, so near ties may fall otherwise and a share is reported. Needs vLLM for CUDA beside
`storm-vlm`.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from test_vllm_engine import CHECKPOINT, ask, counter, engine, opened, params, written
from vllm import __version__

from storm_vlm.data.collator import Question
from storm_vlm.data.row import read_rows
from storm_vlm.data.video import read_video
from storm_vlm.inference.pipeline import GREEDY, StormPipeline
from storm_vlm.lab.bench.vllm_engine import vllm_prompt
from storm_vlm.lab.world.clips import build_world

CASES = {
    "eager": {"enforce_eager": True},
    "graphs": {"enforce_eager": False},  # FULL_AND_PIECEWISE
    "graphs, preempted": {
        "enforce_eager": False,
        "num_gpu_blocks_override": 40,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
    },
}


def main(out: Path, count: int = 200) -> None:
    pipeline = StormPipeline.from_pretrained(CHECKPOINT, device="cuda", dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(build_world(folder, "reasoning", "test", count))[:count]
        clips = [read_video(str(row.video), 6) for row in rows]
    twice = [row.model_copy(update={"question": f"{row.question} {row.question}"}) for row in rows]
    prompts = [
        vllm_prompt(pipeline.processor, row, clip) for row, clip in zip(twice, clips, strict=True)
    ]
    report: dict[str, object] = {"vllm": __version__, "questions": count}
    answers: dict[str, list[list[int]]] = {}
    for name, options in CASES.items():
        with engine(dtype="bfloat16", block_size=16, **options) as llm:
            ask(llm, prompts[:8], params(), 8)
            before, began = counter(llm, "num_preemptions"), time.perf_counter()
            answers[name] = written(ask(llm, prompts, params(), 32))
            report[name] = {
                "equal_to_eager": sum(
                    a == b for a, b in zip(answers[name], answers["eager"], strict=True)
                ),
                "preemptions": counter(llm, "num_preemptions") - before,
                "items_per_second": count / (time.perf_counter() - began),
            }
    ids = []
    for row, clip in zip(twice, clips, strict=True):
        question = Question(clip, row.question, tuple(row.options or ()))
        batch = pipeline.collator.collate_prompts([question], "force")
        batch = {key: value.cuda() for key, value in batch.items()}
        new = pipeline.model.generate(**batch, **GREEDY, max_new_tokens=42)[
            0, batch["input_ids"].shape[1] :
        ].tolist()
        ids.append(new)
    report["eager_equal_to_generate"] = sum(
        a == b for a, b in zip(answers["eager"], opened(ids), strict=True)
    )
    out.write_text(json.dumps(report, indent=1) + "\n")
    worst = min(case["equal_to_eager"] for case in report.values() if isinstance(case, dict))
    sys.exit(0 if worst >= 0.95 * count else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
