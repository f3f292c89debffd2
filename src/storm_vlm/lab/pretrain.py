"""Pretrain a micro backbone from scratch, on perception questions only.

Two things make it learn in minutes. Several questions about a clip are one conversation, so that each clip
is supervised densely; and one of them asks what lies in many cells. First these are listed in order, which is
easy and teaches to read a visual token; then in any order, which can only be done by looking a cell up by its
name. With one question per clip, or with the second list alone, it stays at chance for long.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, set_seed

from storm_vlm.data.collator import LAYOUT, VideoInputs, expand_video
from storm_vlm.data.output import refuse_model
from storm_vlm.data.prompt import build_messages
from storm_vlm.data.row import Row, read_rows
from storm_vlm.evaluation.question_set import evaluate
from storm_vlm.evaluation.statistics import accuracy
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners.latent import Latent
from storm_vlm.lab.world.backbone import ModelType, micro_config, micro_processor
from storm_vlm.lab.world.clips import build_world
from storm_vlm.lab.world.mirrors import HORIZON, NUM_FRAMES, sample_perception
from storm_vlm.lab.world.questions import plan, sample_reasoning
from storm_vlm.lab.world.simulator import REASONING
from storm_vlm.model.latent import IGNORE_INDEX
from storm_vlm.model.modeling import enable_latents
from storm_vlm.training.optimizer import muon_and_nadamw
from storm_vlm.versions import versions


@dataclass(frozen=True)
class Phase:
    """`always` are the families in every conversation; `others` is how many more questions one has."""

    always: tuple[str, ...]
    others: int
    share: float  # of all steps


# Each phase has a warm-up and a cosine decay of its own.
PHASES = (
    Phase(("board", "track"), 3, 0.29),
    Phase(("cells", "track"), 4, 0.44),
    Phase(("cells", "track"), 4, 0.27),
)
TEST_CLIPS = 400
HYPERPARAMETERS = {
    "per_device_train_batch_size": 10,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}
MUON = {"algo": "adamuon", "lr": 8e-3}  # of matrices; the rest has the learning rate above


def pretrain(
    out: Path, data: Path, clips: int, steps: int, seed: int, model_type: ModelType
) -> Path:
    """Train and save the backbone with a model card; returns `out`."""
    refuse_model(out)
    train_rows = read_rows(build_world(data, "perception", "train", clips, seed))
    test_rows = read_rows(build_world(data, "perception", "test", TEST_CLIPS, seed))
    set_seed(seed)
    processor = micro_processor(vocabulary_texts(), model_type)
    config = micro_config(processor, model_type)
    model: Any = enable_latents(AutoModelForImageTextToText.from_config(config))
    model.config.num_frames = NUM_FRAMES
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    by_clip: defaultdict[str, list[Row]] = defaultdict(list)
    for row in train_rows:
        by_clip[row.video].append(row)
    videos = VideoInputs(processor, NUM_FRAMES, cache_bytes=4 * 2**30)
    for phase in PHASES:
        arguments = TrainingArguments(
            output_dir=str(data / "trainer"),
            max_steps=round(phase.share * steps),
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            remove_unused_columns=False,
            **HYPERPARAMETERS,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(by_clip.values()),  # type: ignore[arg-type]  # a list is a dataset
            data_collator=ConversationCollator(processor, videos, phase),
            optimizers=(muon_and_nadamw(model, arguments, MUON), None),
        )
        trainer.train()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_model_card(out, clips, steps, seed, model_type, perception(out, test_rows))
    return out


def perception(backbone: Path, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Accuracy per family, in scenes with `one` ball, with `several`, and in `all`."""
    # Which cells `cells` names, and in which order, is the model's choice: no one answer is right.
    rows = [row for row in rows if row.meta["family"] != "cells"]
    pipeline = StormPipeline.from_pretrained(str(backbone), device="cpu")
    hits: dict[str, defaultdict[str, list[bool]]] = {
        scenes: defaultdict(list) for scenes in ("all", "one", "several")
    }
    reasoner = Latent(pipeline, max_new_tokens=100)
    for row, record in zip(rows, evaluate(reasoner, rows, reasoner.frames), strict=True):
        for scenes in ("all", "one" if row.meta["balls"] == 1 else "several"):
            hits[scenes][row.meta["family"]].append(record.correct)
    return {
        scenes: {family: accuracy(families[family]) for family in sorted(families)}
        for scenes, families in hits.items()
    }


class ConversationCollator:
    """Rows about one clip -> one conversation, with a loss on every answer."""

    def __init__(self, processor: Any, videos: VideoInputs, phase: Phase) -> None:
        self.processor, self.videos, self.phase = processor, videos, phase

    def __call__(self, clips: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
        videos = [self.videos.get(rows[0].video) for rows in clips]
        encoded = [
            self._conversation(rows, video[LAYOUT])
            for rows, video in zip(clips, videos, strict=True)
        ]
        length = max(len(ids) for ids, _ in encoded)
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in encoded])
        labels = torch.tensor(
            [known + [IGNORE_INDEX] * (length - len(known)) for _, known in encoded]
        )
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in encoded])
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "mm_token_type_ids": 2 * (input_ids == self.processor.video_token_id).long(),
            **{n: torch.cat([video[n] for video in videos]) for n in videos[0] if n != LAYOUT},
        }

    def _conversation(self, rows: Sequence[Row], layout: Tensor) -> tuple[list[int], list[int]]:
        dense = [row for row in rows if row.meta["family"] in self.phase.always]
        rest = [row for row in rows if row.meta["family"] not in ("board", "cells", "track")]
        turns = dense + random.sample(rest, min(self.phase.others, len(rest)))
        random.shuffle(turns)
        tokenizer = self.processor.tokenizer
        messages: list[dict[str, Any]] = []
        ids: list[int] = []
        labels: list[int] = []
        written, shown = "", [layout]  # the clip is in the first turn
        for i, row in enumerate(turns):
            messages += build_messages(row.question, num_videos=0 if i else 1)
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            asked = expand_video(self.processor, text[len(written) :], *shown[i:])
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
            answered = row.answer + tokenizer.eos_token
            answer = tokenizer(answered, add_special_tokens=False)["input_ids"]
            ids += prompt + answer
            labels += [IGNORE_INDEX] * len(prompt) + answer
            written = text + answered
            messages.append({"role": "assistant", "content": row.answer})
        return ids, labels


def vocabulary_texts() -> Iterator[str]:
    """What the tokenizer is trained on: the world's questions, answers and plans."""
    rng = random.Random("vocabulary")
    for _, questions in sample_perception(rng, 1500):
        for question in questions:
            yield question.text
            yield question.answer
    for scene, question in sample_reasoning(rng, REASONING, 500, HORIZON):
        yield from (question.text, question.answer, plan(scene, question))
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 100
    yield from ["Answer with the option's letter."] * 100


def write_model_card(
    out: Path,
    clips: int,
    steps: int,
    seed: int,
    model_type: ModelType,
    scores: dict[str, dict[str, float]],
) -> None:
    """`README.md` and `perception.json` beside the weights."""
    table = perception_table(scores)
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    (out / "perception.json").write_text(json.dumps(scores, indent=1) + "\n")
    (out / "README.md").write_text(
        f"""# Micro backbone

A stock model of type `{model_type}` with about a million parameters, trained from scratch on *perception*
questions about clips of STORM's micro world. It has never been asked about anything that its frames do not show.

- Data: {clips} clips (`storm world --kind perception --split train --seed {seed}`), up to
  {max(phase.others + len(phase.always) for phase in PHASES)} questions about a clip in one conversation
- Training: {steps} steps; {", ".join(f"{k} {v}" for k, v in HYPERPARAMETERS.items())}; of matrices, by Muon:
  {", ".join(f"{k} {v}" for k, v in MUON.items())}; seed {seed}
- Made again by `storm pretrain OUT --clips {clips} --steps {steps} --seed {seed} --model-type {model_type}`
- {made_with}
- Licence: Apache-2.0, as the package

Accuracy on {TEST_CLIPS} held-out clips (whole answer right, greedy):

{table}
"""
    )


def perception_table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| family | all scenes | one ball | several |", "|---|---|---|---|"]
    for family in scores["all"]:
        row = [scores[scenes].get(family) for scenes in ("all", "one", "several")]
        cells = " | ".join("" if score is None else f"{score:.1%}" for score in row)
        lines.append(f"| {family} | {cells} |")
    return "\n".join(lines)
