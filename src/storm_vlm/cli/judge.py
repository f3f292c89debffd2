"""`storm judge`: answers that no rule can score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts.types import PositiveInt

from storm_vlm.cli.terminal import Json, errors, show, show_json
from storm_vlm.errors import StormError


def judge(
    run: Path,
    source: Path,
    /,
    *,
    model: str,
    base_url: str | None = None,
    cache: Path | None = None,
    workers: PositiveInt = 8,
    as_json: Annotated[bool, Json] = False,
) -> None:
    """Have a model rate the answers of a run that its benchmark's authors have judged; what was paid is kept.

    Args:
        run: The folder of a finished run.
        source: The folder of the benchmark that it is of.
        model: The judge's name at the endpoint.
        base_url: Of an OpenAI-compatible server, ending in /v1; by default OpenAI's own.
        cache: Folder to keep replies in, for many runs; by default the run's.
        workers: Requests at a time.
        as_json: Print the official figure, to be read by programs.
    """
    from storm_vlm.data.store import Store
    from storm_vlm.evaluation.benchmarks import BENCHMARKS
    from storm_vlm.evaluation.controls import CONTROLS, Control
    from storm_vlm.evaluation.judge import judge as ask
    from storm_vlm.evaluation.run_folder import read_run
    from storm_vlm.evaluation.summary import summarize
    from storm_vlm.inference.client import Endpoint

    finished = read_run(run)
    if finished.benchmark not in BENCHMARKS:
        raise StormError(f"{run} is a run of {finished.benchmark}, which has no judge")
    benchmark = BENCHMARKS[finished.benchmark]()
    endpoint = Endpoint(base_url, "OPENAI_API_KEY", retries=5, timeout=600)
    store = Store(cache or run, durable=True)
    control = CONTROLS[finished.control]() if finished.control else Control()
    rows = [control.row(row) for row in benchmark.read(source)]
    judged = ask(finished, rows, benchmark, endpoint, model, store, workers)
    if not judged.verdicts and not judged.unread:
        raise StormError(
            f"{run}: no answer is for a judge: {finished.benchmark} has a rule for all"
        )
    summary = summarize(read_run(run))
    official = summary.official
    show(
        f"judged {len(judged.verdicts):,} ({judged.cached:,} were there), {judged.unread:,} without a verdict; "
        f"{judged.prompt_tokens:,} tokens read, {judged.tokens:,} written",
        to=errors,
    )
    if as_json:
        show_json(official)
        return
    least = "" if official.scored == summary.n else "at least "
    show(f"official ({official.rule}): {least}{official.accuracy or 0:.1%} of {summary.n:,}")
