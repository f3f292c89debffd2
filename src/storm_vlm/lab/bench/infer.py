"""What each way to reason costs: all of them on one model, one reader and the same rows, in turn, round after round.

The paper's Table 4 has 0.47 s an item for STORM, 15.44 for LongVT and 17.20 for Video-Thinker, each in a harness
of its own. Here only the protocol differs. A model that was not trained for a protocol does not stop by itself, so
lengths are fixed: every turn is just as long as `Lengths` says. Ratios are taken within a round, as a machine may be
shared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoProcessor, Qwen2VLVideoProcessor

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.output import check_outputs
from storm_vlm.data.row import Row, read_rows
from storm_vlm.data.video import write_video
from storm_vlm.errors import InputError
from storm_vlm.evaluation.result_tables import PHASES
from storm_vlm.inference.chat import Completion, Turn
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.local_chat import LocalChat
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.inference.reasoners.single_turn import (
    ChainOfThought,
    Direct,
    GroundedChainOfThought,
)
from storm_vlm.inference.reasoners.tool_loop import ToolLoop
from storm_vlm.inference.reply import Reply
from storm_vlm.lab.bench.passes import bench_passes
from storm_vlm.lab.bench.training_step import (
    Shape,
    machine,
    random_model,
    ratio,
    shape_config,
    spread,
)
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.model.device import torch_device

NOTE = (
    "Lengths are fixed (each turn is forced to them); accuracy is not measured here. All reasoners run in one "
    "process on one model; each round of tools reads its whole conversation again. Ratios are within a round."
)
PAPER = {"latent": 0.47, "tools (LongVT)": 15.44, "grounded_cot (Video-Thinker)": 17.2}
FRAMES, MAX_PIXELS, SECONDS = 32, 256 * 28 * 28, 30  # of the published shapes' clip
COUNTS = ("tokens", "prompt_tokens", "visual_tokens", "rounds")
SIDES, FPS = (720, 1280), 8


@dataclass(frozen=True)
class Lengths:
    """Tokens that each protocol writes: our assumption of what trained models write, where a paper does not say."""

    answer: int = 4
    cot: int = 300
    grounded_cot: int = 500
    tool_rounds: int = 3  #: looks; an answer follows
    tool_tokens: int = 150  #: thought and call of each look
    thoughts: tuple[int, ...] = (64, 256, 1024)  #: chains of thought in the model alone


class Rehearsed:
    """A model made to follow the tools protocol: its time is its own, its text is given.

    Every turn but the last is a call for a third of the video, padded to as many tokens as were really written.
    """

    def __init__(self, chat: LocalChat, lengths: Lengths, length: float) -> None:
        self.chat, self.lengths = chat, lengths
        thirds = np.linspace(0, length, lengths.tool_rounds + 1)
        self.calls = [
            self._padded({"start_time": float(start), "end_time": float(end)})
            for start, end in pairwise(thirds)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        return self.chat.settings

    def _padded(self, window: dict[str, float]) -> str:
        call = json.dumps({"name": "crop_video", "arguments": window})
        text, wanted = f"<tool_call>{call}</tool_call>", self.lengths.tool_tokens
        while (length := self._tokens(text)) < wanted:
            text = "a " * max(1, (wanted - length) // 2) + text
        if length > wanted:
            raise InputError(
                f"a call alone takes {length} tokens, more than the {wanted} of a look"
            )
        return text

    def _tokens(self, text: str) -> int:
        return len(self.chat.processor.tokenizer(text)["input_ids"])

    def write(self, chats: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[Completion]:
        looks = sum(turn.role == "assistant" for turn in chats[0])  # all chats are as far
        if looks == len(self.calls):
            return self.chat.write(chats, self.lengths.answer)
        completions = self.chat.write(chats, min(self.lengths.tool_tokens, max_new_tokens))
        return [replace(turn, text=self.calls[looks]) for turn in completions]


def fixed_reasoners(
    pipeline: StormPipeline, lengths: Lengths, length: float
) -> dict[str, Reasoner]:
    """The five, each made to write just what `lengths` says. `length`: of the videos, in seconds."""
    frames = Frames(pipeline.collator.videos.num_frames)
    chat = LocalChat(pipeline, exact=True)
    config, budget = pipeline.model.config, pipeline.collator.latent_budget
    rehearsed = Rehearsed(chat, lengths, length)
    return {
        "latent": Latent(
            pipeline,
            frames,
            lengths.answer,
            min_new_tokens=lengths.answer + budget + 1,
            suppress_tokens=[config.latent_end_token_id],  # all K slots
        ),
        "direct": Direct(chat, frames, lengths.answer),
        "cot": ChainOfThought(chat, frames, lengths.cot),
        "grounded_cot": GroundedChainOfThought(chat, frames, lengths.grounded_cot),
        "tools": ToolLoop(rehearsed, frames, lengths.tool_tokens, lengths.tool_rounds),
    }


def random_pipeline(
    config: Any,
    budget: int,
    device: str,
    dtype: torch.dtype,
    num_frames: int = FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> StormPipeline:
    """A model of this configuration with random weights, and the shipped tokenizer in front of it."""
    processor = AutoProcessor.from_pretrained(shipped("storm"))
    token = processor.tokenizer.convert_tokens_to_ids
    model = random_model(config, budget, device, dtype)
    for name in ("video", "image"):
        setattr(model.config, f"{name}_token_id", token(f"<|{name}_pad|>"))
    for name in ("start", "end"):
        setattr(model.config, f"vision_{name}_token_id", token(f"<|vision_{name}|>"))
    for name in ("start", "pad", "end"):
        setattr(model.config, f"latent_{name}_token_id", token(f"<|latent_{name}|>"))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    vision = config.vision_config
    processor.video_processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": max_pixels // 2, "longest_edge": max_pixels},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    return StormPipeline(model, processor, num_frames, "force")


def synthetic_row(folder: Path) -> Row:
    """A question about a moving pattern of half a minute in 720p."""
    down, right = np.indices(SIDES)
    frames = [
        np.stack([right + 8 * t, down, right + down - 8 * t], -1).astype(np.uint8)
        for t in range(FPS * SECONDS)
    ]
    write_video(folder / "pattern.mp4", np.stack(frames), FPS)
    return Row(
        id="pattern",
        video=str(folder / "pattern.mp4"),
        question="Which way does the pattern move?",
        options=("left", "right", "up", "down"),
        answer="left",
        split="test",
    )


def bench_infer(
    shape: Shape,
    device: str,
    count: int,
    rounds: int,
    batch_size: int,
    lengths: Lengths,
    results: Path | None,
    batches: Sequence[int] = (),
    layers: int | None = None,
) -> dict[str, Any]:
    """Seconds an item of each reasoner; a first round warms up. Then what each batch takes in the model alone.

    Args:
        shape: `micro`, the shipped model on clips of its world; else a published size with random weights (bf16) on
            a synthetic clip.
        count: items.
        results: JSON file for the record, which keeps what other shapes and devices have in it.
        batches: sizes for `bench_passes`.
        layers: of a published size's decoder and vision tower, where not all of them fit.

    Returns:
        ``reasoners[name]``: ``s_per_item``, ``items_per_s``, ``ratio_to_latent`` and ``ratio_to_direct`` as median,
        low and high over rounds; the phases' ``seconds`` an item; ``tokens`` written, ``slots``; of the last turn
        ``prompt_tokens`` and ``visual_tokens``; ``frames`` shown and ``rounds`` an item. ``batches[size]``: of
        `bench_passes`.
    """
    torch_device(device)
    check_outputs([results], [])
    with TemporaryDirectory() as folder:
        if shape == "micro":
            pipeline = StormPipeline.from_pretrained(str(shipped("storm")), device=device)
            asked = read_rows(build_world(folder, "reasoning", "test", max(count, *batches, 1)))
        else:
            config = shape_config(shape)
            if layers:
                config.text_config.num_hidden_layers = config.vision_config.depth = layers
            pipeline = random_pipeline(config, 8, device, torch.bfloat16)
            asked = [synthetic_row(Path(folder))] * max(count, *batches, 1)
        rows = asked[:count]
        clip = Frames(pipeline.collator.videos.num_frames).read(rows[0])
        assert clip is not None
        reasoners = fixed_reasoners(pipeline, lengths, float(clip.timestamps[-1]))
        spent, replies = measure(reasoners, rows, rounds, batch_size)
        more = {"tools": reasoners["tools"]}
        passes = {
            str(size): bench_passes(
                pipeline, asked[:size], rounds, lengths.answer, lengths.thoughts, more
            )
            for size in batches
        }
    record = {
        "shape": shape,
        **machine(device),
        "items": count,
        "rounds": rounds,
        "batch_size": batch_size,
        "lengths": {**asdict(lengths), "thoughts": list(lengths.thoughts)},
        "latent_budget": pipeline.collator.latent_budget,
        "note": NOTE,
        "reasoners": {name: figures(name, spent, replies[name]) for name in reasoners},
        "batches": passes,
    }
    if results is not None:
        known = json.loads(results.read_text()) if results.exists() else {"7b cuda": "not measured"}
        write_json(results, {**known, "paper": PAPER, f"{shape} {device}": record})
    return record


def measure(
    reasoners: dict[str, Reasoner], rows: Sequence[Row], rounds: int, batch_size: int
) -> tuple[dict[str, list[float]], dict[str, list[Reply]]]:
    """Seconds an item of every round, and all replies, by reasoner."""
    spent: dict[str, list[float]] = {name: [] for name in reasoners}
    replies: dict[str, list[Reply]] = {name: [] for name in reasoners}
    for number in tqdm(range(rounds + 1), "rounds", leave=False):
        for name, reasoner in reasoners.items():
            began = time.perf_counter()
            round_replies = [
                reply
                for first in range(0, len(rows), batch_size)
                for reply in reasoner.answer(rows[first : first + batch_size])
            ]
            if number:  # the first warms up
                spent[name].append((time.perf_counter() - began) / len(rows))
                replies[name] += round_replies
    return spent, replies


def figures(name: str, spent: dict[str, list[float]], replies: Sequence[Reply]) -> dict[str, Any]:
    """One reasoner's line of the record."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    phases = sorted({phase for reply in replies for phase in reply.seconds})
    return {
        "s_per_item": spread(spent[name]),
        "items_per_s": spread([1 / seconds for seconds in spent[name]]),
        "ratio_to_latent": ratio(spent, name, "latent"),
        "ratio_to_direct": ratio(spent, name, "direct"),
        "seconds": {p: mean([reply.seconds.get(p, 0.0) for reply in replies]) for p in phases},
        **{name: mean([getattr(reply, name) for reply in replies]) for name in COUNTS},
        "slots": mean([reply.slots_used for reply in replies]),
        "frames": mean([len(reply.frame_times) for reply in replies]),
    }


def infer_tables(record: dict[str, Any]) -> list[Table]:
    """For the terminal: medians with low and high over rounds; and where the time goes."""
    costs = Table("reasoner", "s/item", "items/s", "x latent", "x direct")
    split = Table("seconds", *PHASES, "tokens")
    for name, line in record["reasoners"].items():
        spreads = (
            "{median:.3g} ({low:.3g}-{high:.3g})".format(**line[key])
            for key in ("s_per_item", "items_per_s", "ratio_to_latent", "ratio_to_direct")
        )
        costs.add_row(name, *spreads)
        spent = (f"{line['seconds'].get(phase, 0.0):.3g}" for phase in PHASES)
        split.add_row(name, *spent, f"{line['tokens']:g}")
    sizes = list(record["batches"])
    model = Table("in the model, ms/item (x latent)", *(f"batch {size}" for size in sizes))
    for name in record["batches"][sizes[0]]["ways"] if sizes else ():
        lines = [record["batches"][size]["ways"][name] for size in sizes]
        cells = [
            f"{1000 * line['s_per_item']['median']:.3g} ({line['to_latent']['median']:.3g})"
            for line in lines
        ]
        model.add_row(name, *cells)
    return [costs, split, model]
