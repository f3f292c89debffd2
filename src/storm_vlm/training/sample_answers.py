"""What the model says to a few validation questions, each time a run is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from storm_vlm.data.answer import is_correct
from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.row import Row
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.backbones import unwrap


@dataclass(frozen=True)
class SampleAnswers:
    """Asks as inference does; keeps the answers of step N in `samples/step-N.json`."""

    processor: Any
    rows: Sequence[Row]
    num_frames: int
    output_dir: Path

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """The share answered right, for the logs."""
        training = model.training
        pipeline = StormPipeline(unwrap(model), self.processor, self.num_frames)
        # One by one: a batch of them need not fit beside what training keeps.
        answers = [pipeline.answer_batch([row])[0] for row in self.rows]
        model.train(training)
        said = [
            {
                "id": row.id,
                "question": row.question,
                "answer": row.answer,
                "said": answer.text,
                "correct": is_correct(answer.text, row),
                "slots_used": answer.slots_used,
                "forced_end": answer.forced_end,
            }
            for row, answer in zip(self.rows, answers, strict=True)
        ]
        write_json(self.output_dir / "samples" / f"step-{step}.json", said)
        first = said[0]
        tqdm.write(
            f"step {step}: {first['question']!r} wants {first['answer']!r}, got {first['said']!r}"
        )
        return {"eval_sample_accuracy": sum(bool(one["correct"]) for one in said) / len(said)}
