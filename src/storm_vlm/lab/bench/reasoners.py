"""Every way to reason on the micro world, with the two shipped checkpoints.

The backbone was taught perception questions, no tags: what it makes of a protocol shows that the protocol runs, not
what a trained reasoner of that kind could do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.row import read_rows
from storm_vlm.evaluation.controls import CONTROLS
from storm_vlm.evaluation.exam import evaluate
from storm_vlm.evaluation.records import Record
from storm_vlm.evaluation.run_folder import Run
from storm_vlm.evaluation.statistics import paired_difference
from storm_vlm.evaluation.summary import summarize
from storm_vlm.inference.frames import FrameCache, Frames
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import Reasoner, build_reasoner
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.versions import commit, versions

KEPT = ("unparsed", "slots_used", "forced_end", "tokens", "rounds")
FIRST = "storm latent"


def bench_reasoners(results: Path, count: int, batch_size: int, bound: int) -> dict[str, Any]:
    """Accuracy with its interval of each arm, and by how much `storm latent` leads it on the same rows.

    `bound`: tokens of a chain of thought's turn. Writes `results`.
    """
    storm = StormPipeline.from_pretrained(str(shipped("storm")), device="cpu")
    backbone = StormPipeline.from_pretrained(str(shipped("backbone")), device="cpu")
    with TemporaryDirectory() as folder:
        rows = read_rows(build_world(folder, "reasoning", "test", count))
        frames = Frames(storm.collator.videos.num_frames, FrameCache(Path(folder) / "frames"))
        arms: dict[str, tuple[Reasoner, str | None]] = {
            FIRST: (build_reasoner("latent", storm, frames), None),
            "storm direct": (build_reasoner("direct", storm, frames), None),
            "backbone direct": (build_reasoner("direct", backbone, frames), None),
        }
        for name in ("cot", "grounded_cot", "tools"):
            arms[f"backbone {name}"] = (build_reasoner(name, backbone, frames, bound), None)
        for control in CONTROLS:
            if control != "permuted_options":  # these questions have none
                arms[f"{FIRST}, {control}"] = (arms[FIRST][0], control)
        records = {
            name: evaluate(reasoner, rows, frames, batch_size, control)
            for name, (reasoner, control) in arms.items()
        }
    found = {
        "command": f"storm bench reasoners --rows {count} --max-new-tokens {bound}",
        "commit": commit(),
        "versions": versions(),
        "n": count,
        "arms": {name: _arm(answered, records[FIRST]) for name, answered in records.items()},
    }
    write_json(results, found)
    return found


def _arm(records: Sequence[Record], first: Sequence[Record]) -> dict[str, Any]:
    ours, theirs = ([[float(r.correct) for r in side]] for side in (first, records))
    summary = summarize(Run(Path(), {"benchmark": "micro"}, tuple(records)))
    share = summary.accuracy
    kept = {name: getattr(summary, name) for name in KEPT}
    return {
        "accuracy": share.mean,
        "interval": [share.low, share.high],
        **kept,
        "behind": paired_difference(ours, theirs),
    }
