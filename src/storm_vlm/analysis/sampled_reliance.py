"""The latent-reliance table beside an accuracy: of a sample of the rows that a run has asked."""

from __future__ import annotations

import random
from dataclasses import replace

from storm_vlm.analysis.reliance import latent_reliance
from storm_vlm.evaluation.exam import Exam
from storm_vlm.evaluation.records import Reliance
from storm_vlm.evaluation.run_folder import Run
from storm_vlm.inference.pipeline import StormPipeline


def sampled_reliance(
    pipeline: StormPipeline, exam: Exam, run: Run, count: int, batch_size: int, seed: int = 0
) -> Reliance:
    """`latent_reliance` of `count` rows drawn from those that could be asked, put as the exam puts them.

    Raises ValueError as `latent_reliance` does, VideoError.
    """
    failed = {record.id for record in run.records if record.error}
    answered = [row for row in exam.rows if row.id not in failed]
    places = random.Random(seed).sample(range(len(answered)), min(count, len(answered)))
    rows = [answered[place] for place in sorted(places)]
    asked = [exam.question(row) for row in rows]
    reliance = latent_reliance(pipeline, rows, None, batch_size, seed, asked)
    return replace(reliance, drawn_from=len(answered))
