"""How rows are put and scored: ours or a published benchmark's, with or without a control."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from storm_vlm.data.answer import is_correct
from storm_vlm.data.check import check_text, check_video, fault_lines, row_faults
from storm_vlm.data.collator import Question
from storm_vlm.data.identity import clip_identity
from storm_vlm.data.prompt import PromptError
from storm_vlm.data.row import Row, RowError, scan_rows
from storm_vlm.data.video import VideoError
from storm_vlm.evaluation.benchmarks import BENCHMARKS, Benchmark
from storm_vlm.evaluation.controls import CONTROLS, Control
from storm_vlm.evaluation.records import Record
from storm_vlm.evaluation.run_folder import RunError
from storm_vlm.evaluation.shares import answer_shares
from storm_vlm.inference.client import RefusedError, UnansweredError
from storm_vlm.inference.frames import Frames, QuestionLike
from storm_vlm.inference.reasoners import Reasoner
from storm_vlm.inference.reply import Reply

NO_ROOM = "does not fit into the device's memory: lower --num-frames or --max-pixels"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuestionSet:
    """Rows, and how each is put and scored. `benchmark` None: a file of rows."""

    rows: Sequence[Row]
    frames: Frames
    benchmark: Benchmark | None = None
    control: str | None = None  #: a name in `CONTROLS`
    prompt: Literal["ours", "official"] = "ours"
    #: why rows are not to be asked, by id, and lines of the file that hold no row, by place
    faults: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)  #: pixels of a frame, by id, where known

    @classmethod
    def read(
        cls, source: Path, benchmark: str | None, limit: int | None, **kwargs: Any
    ) -> QuestionSet:
        """From a JSONL file of rows, or from a folder of published files of the named benchmark.

        Raises:
            RunError: a folder without a benchmark, an unknown one; a prompt or a control that does not apply; no
                row that can be asked.
            RowError, OSError: bad data.
        """
        instance = BENCHMARKS[benchmark]() if benchmark else None
        if instance is None and source.is_dir():
            raise RunError(
                f"{source} is a folder: name its benchmark (--benchmark), or give a file of rows"
            )
        rows, faults = scan_rows(source) if instance is None else (published(instance, source), {})
        questions = cls(rows[:limit], benchmark=instance, faults=faults, **kwargs)
        sizes: dict[str, int] = {}

        def measure(row: Row) -> None:
            sizes[row.id] = check_video(row)

        check = measure if questions.shows_video else check_text
        faults = {**faults, **row_faults(questions.rows, check)}
        questions = dataclasses.replace(questions, faults=faults, sizes=sizes)
        if faults and len(faults) == questions.count:
            raise RunError(f"no row can be asked:\n{fault_lines(faults, source)}")
        questions.check(source)
        return questions

    def check(self, source: Path) -> None:
        """Raises RunError for a prompt or a control that does not apply to these rows."""
        if not self.rows:
            raise RunError(f"{source} holds no row")
        permuted = self._control.PERMUTES_OPTIONS
        if self.prompt == "official" and permuted:
            raise RunError(
                "the official prompt has the published order of options: use --prompt ours"
            )
        if self.prompt == "official" and self.benchmark is None:
            raise RunError("a file of rows has no official prompt: name its benchmark")
        if permuted and not any(row.options for row in self.rows):
            raise RunError(f"{source} has no options to permute")

    @property
    def count(self) -> int:
        """Of the rows, and of the lines that should have held one."""
        return len(self.rows) + len(self.faults.keys() - {row.id for row in self.rows})

    @property
    def shows_video(self) -> bool:
        return self._control.SHOWS_VIDEO

    def by_length(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows about each clip, which share what is read of it; clips of large frames first.

        So little of a batch is padding, and what does not fit shows at the start.
        """
        clips: dict[tuple[str, float | None, float | None], list[Row]] = {}
        for row in rows:
            clips.setdefault((row.video, row.start, row.end), []).append(row)
        return sorted(clips.values(), key=lambda clip: -self.sizes.get(clip[0].id, 0))

    def controlled_row(self, row: Row) -> Row:
        """The row as it is scored."""
        return self._control.row(row)

    def question(self, row: Row) -> QuestionLike:
        """The row with our prompt, or the benchmark's text."""
        if self.prompt == "ours" or self.benchmark is None:
            return row
        return Question(row.video, self.benchmark.official_prompt(row), (), row.start, row.end)

    def controlled_question(self, row: Row) -> QuestionLike:
        """The question as it is put. Raises VideoError."""
        return self._control.question(self.question(row), self.frames, row.id)

    def record(self, row: Row, reply: Reply | None, error: str | None) -> Record:
        """Scored."""
        right = None if reply is None else is_correct(reply.text, row)
        official = None
        if reply is not None and self.benchmark is not None:
            official = self.benchmark.official_score(reply.text, row)
        names = self.benchmark.groups if self.benchmark else ("family",)
        return Record(
            id=row.id,
            video=row.video,
            groups={name: str(row.meta[name]) for name in names if name in row.meta},
            answer=row.answer,
            options=row.options,
            reply=reply,
            correct=bool(right),
            parsed=right is not None,
            official=official,
            error=error,
            clip=clip_identity(row.video),
            shares=answer_shares(reply.text if reply else "", row),
        )

    @property
    def _control(self) -> Control:
        return CONTROLS[self.control]() if self.control else Control()

    def fingerprint(self) -> str:
        """Of the rows, wherever their videos lie."""
        dumps = (row.model_dump_json(exclude={"video", "thought_video"}) for row in self.rows)
        return hashlib.sha256("\n".join(dumps).encode()).hexdigest()[:16]


def published(benchmark: Benchmark, folder: Path) -> list[Row]:
    """Its rows. Raises RowError, OSError, whatever its files hold."""
    try:
        return benchmark.read(folder)
    except (TypeError, AttributeError, LookupError) as error:
        raise RowError(
            f"{folder} holds files that are not as {benchmark.name} publishes them "
            f"({type(error).__name__}: {error}): download them again"
        ) from error


def answer_rows(
    reasoner: Reasoner, questions: QuestionSet, rows: Sequence[Row], batch_size: int
) -> Iterator[list[Record]]:
    """Records, batch by batch; a row that cannot be asked gets one with its error. Raises EndpointError."""
    for first in range(0, len(rows), batch_size):
        batch = [questions.controlled_row(row) for row in rows[first : first + batch_size]]
        outcomes: dict[str, Reply | str] = {r.id: questions.faults.get(r.id, "") for r in batch}
        sound = [row for row in batch if not outcomes[row.id]]
        outcomes |= zip(
            (row.id for row in sound), _replies(reasoner, questions, sound), strict=True
        )
        yield [
            questions.record(row, *((None, out) if isinstance(out, str) else (out, None)))
            for row, out in ((row, outcomes[row.id]) for row in batch)
        ]


def _replies(reasoner: Reasoner, questions: QuestionSet, batch: Sequence[Row]) -> list[Reply | str]:
    """A reply each, or what is wrong with the row; the others of its batch are then asked one by one.

    What the device has no room for is asked in halves.
    """
    if not batch:
        return []
    try:
        return list(reasoner.answer([questions.controlled_question(row) for row in batch]))
    except (VideoError, PromptError, RefusedError, UnansweredError) as error:
        fault, size = str(error), 1
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        log.warning("%d at a time do not fit into the device's memory", len(batch))
        fault, size = NO_ROOM, max(1, len(batch) // 2)
    clear_device_cache(garbage_collection=True)  # only now, as the error held on to its tensors
    if len(batch) == 1:
        return [fault]
    parts = [batch[first : first + size] for first in range(0, len(batch), size)]
    return [reply for part in parts for reply in _replies(reasoner, questions, part)]


def evaluate(
    reasoner: Reasoner,
    rows: Sequence[Row],
    frames: Frames,
    batch_size: int = 32,
    control: str | None = None,
) -> list[Record]:
    """Records of a few rows, in memory. Raises VideoError for a clip that cannot be read."""
    questions = QuestionSet(rows, frames, control=control)
    batches = answer_rows(reasoner, questions, rows, batch_size)
    progress = tqdm(batches, f"evaluate {control or ''}", -(-len(rows) // batch_size), leave=False)
    records = [record for batch in progress for record in batch]
    for record in records:
        if record.error:
            raise VideoError(record.error)
    return records
