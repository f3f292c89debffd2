"""A judge: a model behind an OpenAI-compatible endpoint that rates answers which no rule can, as authors have it do.

Its replies are kept under the hash of what it was asked, so an answer is paid for once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.errors import InputError
from storm_vlm.inference.client import (
    Endpoint,
    EndpointError,
    RefusedError,
    Response,
    UnansweredError,
    read_completion,
)

if TYPE_CHECKING:
    from storm_vlm.evaluation.benchmarks import Benchmark
    from storm_vlm.evaluation.run_folder import Run

JUDGED = "judge.json"
MAX_TOKENS = 1024
SILENT = 3  # requests without an answer, one after another: the endpoint is down


@dataclass(frozen=True)
class Judged:
    """What a judge said of a run's answers."""

    model: str
    endpoint: str
    verdicts: dict[str, float]  #: 0 to 1, by the record's id
    unread: int  #: replies without a verdict, and requests without a reply
    cached: int  #: replies that were there already
    prompt_tokens: int  #: paid for now
    tokens: int


_JUDGED = TypeAdapter(Judged)


def equality_prompt(row: Row, text: str, options: str = "") -> str:
    """Whether a text's final answer is the right one, to be told as JSON."""
    listed = f"\n{options.strip()}" if options.strip() else ""
    return (
        "Tell whether a model's final answer to a question about a video is right. It need not have the words of the "
        "right answer, but must mean the very same; a text without a final answer is wrong.\n\n"
        f"Question: {row.question}{listed}\n\nRight answer: {row.answer}\n\nThe model's text: {text}\n\n"
        'Write only JSON: {"answer": the final answer that you read in the text, "correct": true or false}'
    )


def verdict(reply: str, answer: str = "") -> float | None:
    """Of the last JSON in a judge's reply: "correct", the mean of "scores" (0 to 5), or whether its "choice" is the
    first letter of the right answer; None: nothing of these.
    """
    for found in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            said: dict[str, Any] = json.loads(found)
        except ValueError:
            continue
        if isinstance(said.get("correct"), bool):
            return float(said["correct"])
        if isinstance(choice := said.get("choice"), str):
            return float(choice.strip()[:1] == answer[:1])
        scores: list[Any] = said["scores"] if isinstance(said.get("scores"), list) else []
        if scores and all(type(score) in (int, float) and 0 <= score <= 5 for score in scores):
            return sum(scores) / (5 * len(scores))
    return None


def judge(
    run: Run,
    rows: Sequence[Row],
    benchmark: Benchmark,
    endpoint: Endpoint,
    model: str,
    store: Store,
    workers: int,
) -> Judged:
    """Asks about each answer of a run that the benchmark has judged, and keeps `judge.json` in the run's folder.

    Raises:
        EndpointError: the endpoint is down, or takes no request.
    """
    by_id = {row.id: row for row in rows}
    prompts = {
        record.id: (prompt, row.answer)
        for record in run.records
        if record.reply and (row := by_id.get(record.id))
        if (prompt := benchmark.judge_prompt(record.reply.text, row)) is not None
    }
    with thread_pool(workers) as pool:
        asked = list(
            pool.map(
                partial(_ask, endpoint, model, store), [prompt for prompt, _ in prompts.values()]
            )
        )
    verdicts = {
        id: said
        for (id, (_, answer)), (response, _) in zip(prompts.items(), asked, strict=True)
        if response and (said := verdict(response.text, answer)) is not None
    }
    paid = [response for response, cached in asked if response and not cached]
    judged = Judged(
        model=model,
        endpoint=endpoint.name,
        verdicts=verdicts,
        unread=len(prompts) - len(verdicts),
        cached=sum(cached for _, cached in asked),
        prompt_tokens=sum(response.prompt_tokens for response in paid),
        tokens=sum(response.tokens for response in paid),
    )
    write_json(run.folder / JUDGED, asdict(judged))
    return judged


def _ask(endpoint: Endpoint, model: str, store: Store, prompt: str) -> tuple[Response | None, bool]:
    """A reply, and whether it was there already; None: this request was refused."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    key = key_of(**body)
    if kept := store.read("judge", key, lambda path: read_completion(path.read_bytes())):
        return kept, True
    try:
        raw, response = endpoint.complete(body)
    except RefusedError:
        return None, False
    except UnansweredError as error:
        if endpoint.silence < SILENT:
            return None, False
        raise EndpointError(f"{error}; check address, key and model, then run again") from error
    if verdict(response.text) is not None:
        store.write("judge", key, raw)
    return response, False


def read_judged(folder: Path) -> Judged | None:
    """A run's `judge.json`; None where it was not judged. Raises InputError for another kind of file."""
    file = folder / JUDGED
    try:
        return _JUDGED.validate_json(file.read_bytes()) if file.exists() else None
    except ValidationError as error:
        raise InputError(
            f"{file}: not what storm judge writes: remove it, and judge again"
        ) from error
