# pyright: reportMissingImports=false
"""vLLM with our plugin beside the pipeline and transformers' own `generate`, in one process: `storm bench vllm`.

Items for each second of CPU. All are given decoded clips, prepare them every time, and answer as many at a time.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import build_messages, render_prompt
from storm_vlm.data.row import Row, read_rows
from storm_vlm.data.video import Clip, read_video, video_metadata
from storm_vlm.errors import StormError
from storm_vlm.inference.pipeline import GREEDY, StormPipeline
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.versions import commit, versions

QUESTIONS = 32  # of a round
MAX_TOKENS = 42  # with the segment


@dataclass(frozen=True)
class Throughput:
    """Items a second of CPU, at one concurrency."""

    concurrency: int
    vllm: float
    pipeline: float
    vllm_off: float
    pipeline_off: float
    stock_generate: float  #: transformers' model, of as many forward passes as an answer with slots
    ratio: float  #: vLLM to the pipeline, both with slots
    ratio_off: float
    slots_to_stock: float  #: vLLM with slots to stock `generate`


def bench_vllm(rounds: int, results: Path | None = None) -> dict[str, Any]:
    """Throughputs at 1, 8 and 32 questions at a time, on the micro model; under "vllm" in a file of results.

    Raises StormError where vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise StormError(
            "storm bench vllm needs vLLM: make test-vllm makes an environment that has it"
        )
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, one clock
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import vllm
    from transformers import Qwen2_5_VLForConditionalGeneration

    path = str(shipped("storm"))
    engine = vllm.LLM(
        path,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=32,
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        kv_cache_memory_bytes=2**26,
    )
    slots, off = (StormPipeline.from_pretrained(path, latent_mode=m) for m in ("force", "off"))
    stock: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    stock.generation_config.eos_token_id = None
    with TemporaryDirectory() as folder:
        rows = read_rows(build_world(folder, "reasoning", "test", QUESTIONS))[:QUESTIONS]
        clips = [read_video(str(row.video), slots.collator.videos.num_frames) for row in rows]
    questions = [
        Question(clip, row.question, tuple(row.options or ()))
        for row, clip in zip(rows, clips, strict=True)
    ]
    prompts = [
        vllm_prompt(slots.processor, question, clip)
        for question, clip in zip(questions, clips, strict=True)
    ]
    passes = 3 + slots.model.config.latent_budget + 1

    def served(mode: str) -> Callable[[int, int], object]:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=MAX_TOKENS, extra_args={"latent_mode": mode}
        )
        return lambda start, end: engine.generate(prompts[start:end], params, use_tqdm=False)

    def generated(start: int, end: int) -> object:
        batch = off.collator.collate_prompts(questions[start:end], "off")
        return stock.generate(**batch, **GREEDY, max_new_tokens=passes)

    ways: dict[str, Callable[[int, int], object]] = {
        "vllm": served("force"),
        "pipeline": lambda start, end: slots.answer_batch(questions[start:end]),
        "vllm_off": served("off"),
        "pipeline_off": lambda start, end: off.answer_batch(questions[start:end]),
        "stock_generate": generated,
    }
    found = [asdict(_throughput(ways, concurrency, rounds)) for concurrency in (1, 8, 32)]
    report = {
        "commit": commit(),
        "versions": {**versions(), "vllm": vllm.__version__},
        "passes": passes,
        "throughput": found,
    }
    if results is not None:
        known = json.loads(results.read_text()) if results.exists() else {}
        write_json(results, {**known, "vllm": report})
    return report


def _throughput(
    ways: dict[str, Callable[[int, int], object]], count: int, rounds: int
) -> Throughput:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, answer in ways.items():
            began = time.process_time()
            for start in range(0, QUESTIONS, count):
                answer(start, start + count)
            rates[name].append(QUESTIONS / (time.process_time() - began))

    def median(name: str, other: str | None = None) -> float:
        pairs = zip(rates[name], rates[other] if other else [1.0] * (rounds + 1), strict=True)
        return statistics.median([rate / base for rate, base in pairs][1:])  # the first warms up

    return Throughput(
        concurrency=count,
        **{name: median(name) for name in ways},
        ratio=median("vllm", "pipeline"),
        ratio_off=median("vllm_off", "pipeline_off"),
        slots_to_stock=median("vllm", "stock_generate"),
    )


def vllm_prompt(processor: Any, question: Question | Row, clip: Clip) -> dict[str, Any]:
    """What `vllm.LLM.generate` takes for a question about a decoded clip."""
    text = render_prompt(processor, build_messages(question.question, question.options), "auto")
    metadata = {**asdict(video_metadata(clip)), "do_sample_frames": False}
    return {"prompt": text, "multi_modal_data": {"video": [(clip.frames, metadata)]}}
