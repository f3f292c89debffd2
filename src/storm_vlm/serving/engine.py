"""Waiting questions are answered together, in a thread of their own, by the one pipeline.

transformers' own `StoppingCriteria` sees every row after each token: there text is handed on as it comes, and a row
whose client has left is ended.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import LATENT_MODES, LatentMode
from storm_vlm.errors import StormError
from storm_vlm.inference.pipeline import Answer, StormPipeline

log = logging.getLogger(__name__)
Event = str | Answer | Exception  # a piece of text; the end, good or bad


@dataclass(eq=False)
class Job:
    """One question, and whom to tell. Pieces of text add up to the answer's text."""

    question: Question
    latent_mode: LatentMode
    max_tokens: int
    tell: Callable[[Event], object]
    sampling: Mapping[str, float] = field(
        default_factory=dict
    )  #: arguments of `generate`; none: greedy
    seed: int | None = None
    streamed: bool = True  #: else it is told the end alone
    abandoned: bool = False  #: nobody waits for it
    stopped: bool = False  #: it ended its turn; else its tokens were used up
    written: str = ""

    def abandon(self) -> None:
        self.abandoned = True

    def write(self, text: str) -> None:
        """The text so far, less what may still change: a character cut in two, or space at its end."""
        text = text.strip()
        if len(text) > len(self.written) and text.startswith(self.written) and text[-1] != "\ufffd":
            self.tell(text[len(self.written) :])
            self.written = text

    def end(self, answer: Answer) -> None:
        """The answer; of one that was told in pieces, what is left of its text before."""
        if self.streamed and (rest := answer.text.removeprefix(self.written)):
            self.tell(rest)
        self.tell(answer)

    @property
    def company(self) -> object:
        """Equal for those that can be answered together; what is sampled is sampled alone, by its own seed."""
        return self if self.sampling else (self.latent_mode, self.max_tokens)


class _Watch(StoppingCriteria):
    def __init__(self, jobs: Sequence[Job], pipeline: StormPipeline) -> None:
        self.jobs, self.tokenizer = jobs, pipeline.processor.tokenizer
        ends = pipeline.model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.over = [False] * len(jobs)
        self.start: int | None = None  # where answers begin

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if self.start is None:
            self.start = input_ids.shape[1] - 1
        for i, ids in enumerate(input_ids[:, self.start :].tolist()):
            if not self.over[i]:
                self.over[i] = self.jobs[i].stopped = ids[-1] in self.ends
                if self.jobs[i].streamed:
                    self.jobs[i].write(self.tokenizer.decode(ids, skip_special_tokens=True))
        left: Tensor = torch.tensor([job.abandoned for job in self.jobs], device=input_ids.device)
        return left


class Engine:
    """Answers jobs in the order they come, up to `batch_size` at a time. `close` ends its thread."""

    def __init__(self, pipeline: StormPipeline, batch_size: int) -> None:
        self.batch_size = batch_size
        self.default: LatentMode = pipeline.latent_mode
        self.modes: tuple[LatentMode, ...] = ("off",)
        if pipeline.collator.latent_budget:
            self.modes = LATENT_MODES
        self.num_frames = frames = pipeline.collator.videos.num_frames
        model, processor = pipeline.model, pipeline.processor
        self.pipelines = {m: StormPipeline(model, processor, frames, m) for m in self.modes}
        self.model = threading.Lock()  #: held while the model works
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Callable[[], object]:
        """Returns how to take the job back."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job.abandon

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[Job]:
        """The first that waits, and others that can keep it company; none when it is closed."""
        with self._changed:
            while True:
                waiting = [job for job in self._waiting if not job.abandoned]
                if waiting or self._closed:
                    break
                self._waiting.clear()
                self._changed.wait()
            chosen = [job for job in waiting if job.company == waiting[0].company]
            chosen = chosen[: self.batch_size]
            self._waiting = deque(job for job in waiting if job not in chosen)
            return chosen

    def _answer(self, batch: list[Job]) -> None:
        first, pipeline = batch[0], self.pipelines[batch[0].latent_mode]
        if first.seed is not None:
            torch.manual_seed(first.seed)
        try:
            with self.model:
                answers = pipeline.answer_batch(
                    [job.question for job in batch],
                    first.max_tokens,
                    stopping_criteria=StoppingCriteriaList([_Watch(batch, pipeline)]),
                    **({"do_sample": True, **first.sampling} if first.sampling else {}),
                )
        except Exception as error:
            if len(batch) > 1:  # whosever fault it is, the others are answered
                for job in batch:
                    self._answer([job])
                return
            if not isinstance(error, StormError):
                log.exception("a question could not be answered")
            first.tell(error)
            return
        for job, answer in zip(batch, answers, strict=True):
            share = {phase: spent / len(batch) for phase, spent in answer.seconds.items()}
            job.end(replace(answer, seconds=share))
