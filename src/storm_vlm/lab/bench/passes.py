"""What a latent answer costs in the model: beside stock ``generate`` of as many passes, a rollout without a cache,
and chains of thought; all on the same weights and inputs, in turn.

Where the device is the CPU, seconds are the process's own, as others may use the machine, too. `floor_s` is what the
counted work takes at the rates that this machine was seen to reach; the rest is how the work is handed out: Python,
one small operation after another.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText

from storm_vlm.data.collator import Question
from storm_vlm.data.row import Row
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.pipeline import GREEDY, StormPipeline
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.inference.timing import Phases
from storm_vlm.lab.bench.training_step import naive_rollout, ratio, spread
from storm_vlm.model.backbones import input_device
from storm_vlm.model.rollout import rollout
from storm_vlm.training.flops import FlopCounter

FINE, TURNS = ("latent", "stock"), 8  # asked so many times a round, as their ratio is a fine one
QUICK = ("latent", "stock", "direct", "naive")  # counted for their floors
SIDE, COPIED = 768, 2**25  # of the matrices, and numbers, that rates are measured with
Inputs = dict[str, Tensor]


def stock_twin(model: Any) -> Any:
    """The stock class with the same weights."""
    config, attention = copy.deepcopy(model.config), model.config._attn_implementation
    build: Any = AutoModelForImageTextToText.from_config
    twin = build(config, dtype=model.dtype, attn_implementation=attention).to(model.device)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.eval()


def naive_answer(model: Any, inputs: Inputs, budget: int, tokens: int) -> Tensor:
    """Ids (B, A) without a cache: for each slot and each token of the answer one pass over all that came before."""
    states = naive_rollout(model, inputs, budget).states
    said = inputs["input_ids"][:, :0]
    for _ in range(tokens):
        labels = torch.cat([said, said.new_zeros(len(states), 1)], 1)
        logits = rollout(model, {**inputs, "labels": labels}, budget, states).logits
        said = torch.cat([said, logits[:, -1:].argmax(-1)], 1)
    return said


def ways(
    pipeline: StormPipeline, opened: Inputs, plain: Inputs, answer: int, thoughts: Sequence[int]
) -> dict[str, Callable[[], Any]]:
    """What is compared, each as long as it says. `opened` and `plain`: with and without ``<|latent_start|>``."""
    model, budget = pipeline.model, pipeline.collator.latent_budget
    stock, end = stock_twin(model), model.config.latent_end_token_id
    passes = budget + 1 + answer

    def write(writer: Any, inputs: Inputs, tokens: int, **options: Any) -> Any:
        fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "suppress_tokens": [end]}
        options = {"return_dict_in_generate": True, **GREEDY, **fixed, **options}
        return writer.generate(**inputs, **options)

    latent = {"latent_mode": "force", "output_latent_states": True}
    return {
        "latent": lambda: write(model, opened, passes, **latent),
        "stock": lambda: write(stock, opened, passes),
        "direct": lambda: write(stock, plain, answer),
        "naive": lambda: naive_answer(model, opened, budget, answer),
        **{f"cot_{n}": lambda n=n: write(stock, plain, n + answer) for n in thoughts},
    }


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The best of a few tries: FLOPs a second of a product of matrices, bytes a second of a copy."""
    matrix = torch.randn(SIDE, SIDE, device=device).to(dtype)
    source = torch.zeros(COPIED, device=device)
    target = torch.empty_like(source)
    product = min(_seconds(device, lambda: matrix @ matrix) for _ in range(10))
    copied = min(_seconds(device, lambda: target.copy_(source)) for _ in range(10))
    return {"flops_per_s": 2 * SIDE**3 / product, "bytes_per_s": 2 * source.nbytes / copied}


def floor(way: Callable[[], Any], rate: Mapping[str, float]) -> float:
    """Seconds of the counted FLOPs, or of reading once what each product of matrices reads, whichever are more."""
    with FlopCounter() as counted:
        way()
    return max(counted.flops / rate["flops_per_s"], counted.read / rate["bytes_per_s"])


@torch.inference_mode()
def bench_passes(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    rounds: int,
    answer: int,
    thoughts: Sequence[int],
    reasoners: Mapping[str, Reasoner],
) -> dict[str, Any]:
    """One batch of `rows`, `rounds` times over; a first turn of the quick ones warms up.

    `answer` and `thoughts` are tokens; `reasoners` are asked as they are, reading included.

    Returns:
        ``ways[name]``: ``s_per_item`` and its ratios ``to_latent`` and ``to_stock``, each median, low and high over
        rounds. ``read`` and ``preprocess`` are ways, too: what comes before the model. ``phases``: shares of a latent
        answer's time in the model. ``rates``: of this machine; ``floor_s``: what the counted work takes at them.
    """
    model, device = pipeline.model, str(input_device(pipeline.model))
    clips: list[Any] = []

    def read() -> None:
        clips[:] = [Frames(pipeline.collator.videos.num_frames).read(row) for row in rows]

    def preprocess(mode: Any = "force") -> Inputs:
        asked = [Question(c, r.question, r.options) for c, r in zip(clips, rows, strict=True)]
        inputs = pipeline.collator.collate_prompts(asked, mode)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    read()
    opened = preprocess()
    compared = ways(pipeline, opened, preprocess("off"), answer, thoughts)
    with Phases(model) as phases:
        output = compared["latent"]()
    split = phases.split(output.sequences[:, opened["input_ids"].shape[1] :])
    rate = rates(device, model.dtype)
    asked = {n: lambda reasoner=r: reasoner.answer(rows) for n, r in reasoners.items()}
    everything = {"read": read, "preprocess": preprocess, **compared, **asked}
    floors = {name: floor(compared[name], rate) / len(rows) for name in QUICK}  # warms up, too
    spent: dict[str, list[float]] = {name: [] for name in everything}
    for _ in tqdm(range(rounds), f"batches of {len(rows)}", leave=False):
        found: dict[str, list[float]] = {name: [] for name in everything}
        for turn in range(TURNS):
            for name, way in everything.items():
                if turn == 0 or name in FINE:
                    found[name].append(_seconds(device, way))
        for name, seconds in found.items():
            spent[name].append(statistics.median(seconds) / len(rows))
    return {
        "phases": {phase: seconds / sum(split.values()) for phase, seconds in split.items()},
        "rates": rate,
        "floor_s": floors,
        "ways": {
            name: {
                "s_per_item": spread(spent[name]),
                "to_latent": ratio(spent, name, "latent"),
                "to_stock": ratio(spent, name, "stock"),
            }
            for name in everything
        },
    }


def _seconds(device: str, way: Callable[[], Any]) -> float:
    clock = time.process_time if device == "cpu" else _after_the_device
    began = clock()
    way()
    return clock() - began


def _after_the_device() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
