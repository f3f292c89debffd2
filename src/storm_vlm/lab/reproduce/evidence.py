"""`storm reproduce`: train what is compared, measure, probe, and write it down.

Every run leaves its outcomes, and every other part a file of its own; what is there is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storm_vlm.analysis.validate import read_analysis, validate
from storm_vlm.data.atomic_write import write_json, write_text
from storm_vlm.errors import InputError
from storm_vlm.lab.arms import ARMS, COMPARISONS, STUDIES, Comparison
from storm_vlm.lab.bench.infer import Lengths, bench_infer
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.experiment import Result, Size, read_results, run_arms
from storm_vlm.lab.reproduce.comparison_table import comparison_table, reference_scores
from storm_vlm.lab.reproduce.evidence_page import markdown, studies_markdown, write_page
from storm_vlm.lab.world.clips import build_world
from storm_vlm.versions import commit, versions


@dataclass(frozen=True)
class Plan:
    """How much of everything: `probed` clips with four questions each, `drawn` training clips for the decoder."""

    size: Size
    seeds: int
    probed: int = 100
    drawn: int = 1000
    rounds: int = 9  #: of the latency measurement


FULL = Plan(Size(train_rows=6000, test_rows=400, ood_rows=200, steps=1200), seeds=3)
# Everything once, and far too short to learn anything: a rehearsal.
FAST = Plan(
    Size(train_rows=320, test_rows=60, ood_rows=20, steps=30),
    seeds=1,
    probed=20,
    drawn=100,
    rounds=2,
)


def reproduce(
    folder: Path,
    out: Path,
    plan: Plan,
    chosen: Sequence[str] = (),
    jobs: int = 2,
    command: str = "storm reproduce",
) -> dict[str, Any]:
    """The comparisons `chosen` (all of them by default), then latency, analysis, tables and page.

    Data, checkpoints and the page go into `folder`, which a second call goes on with; into `out` go `results.md`
    and, in `results/`, the figures for the record and every run's outcomes (`outcomes/`). A run that has outcomes is
    not done again, whatever machine it ran on, and tables show all there are.

    Raises:
        InputError: no comparison has such a name, or a folder holds runs of other settings.
    """
    if unknown := set(chosen) - set(COMPARISONS):
        raise InputError(
            f"no comparison is called {', '.join(sorted(unknown))}: choose from {', '.join(COMPARISONS)}; or, by "
            f"themselves, from {', '.join(STUDIES)}"
        )
    outcomes = out / "results" / "outcomes"
    for place in (folder, outcomes):
        _belongs(place, plan)
    wanted = dict.fromkeys(a for name in chosen or COMPARISONS for a in COMPARISONS[name].arms)
    trained = [arm for arm in wanted if ARMS[arm].trained]
    run_arms(folder, outcomes, trained, range(plan.seeds), plan.size, jobs)
    run_arms(folder, outcomes, ["base"], [0], plan.size, 1)
    results = read_results(outcomes, plan.size)
    latency = _latency(folder / "latency.json", plan.rounds)
    analysis = _analysis(folder, plan)
    evidence = {
        **_compared(COMPARISONS, results, results, plan, command),
        "references": reference_scores(
            plan.size.train_rows, plan.size.test_rows, results.get("sft", ())
        ),
        "latency": latency,
        "analysed": {"full-0": "STORM of seed 0", "shipped": "the shipped STORM"}[analysis.name],
        **vars(read_analysis(analysis)),
    }
    write_json(out / "results" / "reproduce.json", evidence)
    reliance = json.loads((analysis / "reliance.json").read_text())
    reliance |= {"command": command, "checkpoint": evidence["analysed"]}
    write_json(out / "results" / "reliance.json", reliance)
    write_text(out / "results.md", markdown(evidence))
    examples = json.loads((analysis / "examples.json").read_text())
    write_page(folder / "report.html", evidence, examples)
    return evidence


def study(
    folder: Path, out: Path, plan: Plan, chosen: Sequence[str], jobs: int, command: str
) -> dict[str, Any]:
    """The STUDIES `chosen`, beside the record, with outcomes in `results/method/`; then the page of all of them.

    Arms that the record in `out` has are taken from there, with its seeds.

    Raises:
        InputError: a folder holds runs of other settings.
    """
    outcomes = out / "results" / "method"
    for place in (folder, outcomes):
        _belongs(place, plan)
    recorded = read_results(out / "results" / "outcomes", plan.size)
    arms = dict.fromkeys(a for name in chosen for a in STUDIES[name].arms if a not in recorded)
    run_arms(folder, outcomes, list(arms), range(plan.seeds), plan.size, jobs)
    return write_studies(out, plan, command)


def write_studies(out: Path, plan: Plan, command: str) -> dict[str, Any]:
    """The page of all studies, and its figures, from the outcomes that are there."""
    made = read_results(out / "results" / "method", plan.size)
    results = made | read_results(out / "results" / "outcomes", plan.size)
    evidence = _compared(STUDIES, results, made, plan, command)
    write_json(out / "results" / "method.json", evidence)
    write_text(out / "results" / "method.md", studies_markdown(evidence))
    return evidence


def _compared(
    comparisons: Mapping[str, Comparison],
    results: dict[str, list[Result]],
    made: dict[str, list[Result]],
    plan: Plan,
    command: str,
) -> dict[str, Any]:
    """Tables, and how their runs came about; `made` are those of the results whose cost is told."""
    rehearsal = plan.size.steps <= FAST.size.steps
    return {
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "rehearsal": rehearsal,
        "steps": plan.size.steps,
        "train_rows": plan.size.train_rows,
        "n_test": plan.size.test_rows,
        "cost": _cost(made),
        "tables": {n: comparison_table(c, results, rehearsal) for n, c in comparisons.items()},
    }


RESULTS = ("*.json.gz", "*-*/*/checkpoint-*", "*-*/*/versions.json", "latency.json")


def _belongs(folder: Path, plan: Plan) -> None:
    """Runs of different settings do not go together: a folder is one plan's once a run has come to something.

    Only seeds may be added.
    """
    file = folder / "plan.json"
    wanted = {key: value for key, value in asdict(plan).items() if key != "seeds"}
    if not file.exists():
        write_json(file, wanted)
        return
    try:
        known = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}): remove it") from error
    if known != wanted and any(path for pattern in RESULTS for path in folder.glob(pattern)):
        raise InputError(
            f"{folder} holds runs of other settings ({known}), not of {plan}: choose another folder"
        )
    write_json(file, wanted)


def _cost(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """What the runs took that were done in one go, of all that there are."""
    runs = [run for arm in results.values() for run in arm if ARMS[run["arm"]].trained]
    timed = [run["seconds"] for run in runs if run["seconds"] is not None]
    return {"runs": len(runs), "timed": len(timed), "core_hours": sum(timed) / 3600}


def _latency(file: Path, rounds: int) -> dict[str, Any]:
    """Table 4: what each way to reason takes, by `storm bench infer` on the micro model."""
    if not file.exists():
        bench_infer("micro", "cpu", 2, rounds, 1, Lengths(), file)
    return json.loads(file.read_text())


def _analysis(folder: Path, plan: Plan) -> Path:
    """Folder of what `storm validate` finds of the STORM of seed 0, or of the shipped one if there is none."""
    trained = (folder / "full-0" / "1-stage2" / "versions.json").exists()
    checkpoint = folder / "full-0" / "1-stage2" if trained else shipped("storm")
    out = folder / "analysis" / ("full-0" if trained else "shipped")
    if not (out / "report.html").exists():  # the last file that a validation writes
        data = folder / "data"
        test = build_world(data, "reasoning", "test", plan.size.test_rows)
        probed = build_world(data, "reasoning", "test", plan.probed, questions=4)
        drawn = build_world(data / "drawn", "reasoning", "train", plan.drawn)
        validate(str(checkpoint), test, out, retrieval_file=probed, decoder_file=drawn)
    return out
