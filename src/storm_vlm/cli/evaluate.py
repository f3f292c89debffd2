"""`storm evaluate`, and how benchmarks come and go: `storm download`, `storm lmms-task`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts.types import NonNegativeInt, NormFloat, PositiveInt

from storm_vlm.cli.terminal import Json, Switch, errors, part_of, show, show_json
from storm_vlm.cli.validate import print_reliance
from storm_vlm.errors import StormError
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.controls import CONTROLS
from storm_vlm.inference.reasoners import REASONERS, build_reasoner, default_reasoner

if TYPE_CHECKING:
    from storm_vlm.evaluation.question_set import QuestionSet
    from storm_vlm.evaluation.run_folder import Run
    from storm_vlm.inference.pipeline import StormPipeline

RELIANCE_ROWS = 200
MANY_UNPARSED = 0.5  # a share that wants an example
NAMED = 10  # rows that could not be asked, of those that only the asking showed
Benchmark = Annotated[str | None, part_of(BENCHMARKS, "Which one the folder holds.")]
Reasoner = Annotated[
    str | None,
    part_of(REASONERS, "By default latent for a checkpoint with slots, else direct."),
]
Control = Annotated[
    str | None,
    part_of(CONTROLS, "Take away what a model that watches the video would need."),
]


def evaluate(
    checkpoint: str,
    source: Path,
    /,
    *,
    benchmark: Benchmark = None,
    reasoner: Reasoner = None,
    base_url: str | None = None,
    control: Control = None,
    prompt: Literal["ours", "official"] = "ours",
    out: Path | None = None,
    batch_size: PositiveInt = 8,
    max_errors: NormFloat = 0.01,
    max_new_tokens: PositiveInt | None = None,
    num_frames: PositiveInt | None = None,
    max_pixels: PositiveInt | None = None,
    frame_cache: Path | None = None,
    latent_mode: Literal["force", "auto", "off"] | None = None,
    limit: PositiveInt | None = None,
    reliance_rows: NonNegativeInt | None = None,
    readers: NonNegativeInt | None = None,
    trust_remote_code: Annotated[bool, Switch] = False,
    as_json: Annotated[bool, Json] = False,
) -> None:
    """Accuracy with intervals on a file of rows or a benchmark; under `accelerate launch` on many GPUs.

    Args:
        checkpoint: Folder or hub name; with --base-url, the model's name there.
        source: A JSONL file of rows, or the folder of a published benchmark.
        base_url: Of an OpenAI-compatible server, ending in /v1.
        prompt: official: the benchmark's own text.
        out: Folder to keep every answer in; a killed run goes on.
        batch_size: Rows at a time; with --base-url, requests.
        max_errors: Share of rows that may fail to be asked; more is an error.
        max_new_tokens: Of a turn; by default the reasoner's.
        num_frames: By default as trained, else 32.
        max_pixels: Of a frame; by default the processor's.
        frame_cache: Folder to keep decoded frames in.
        latent_mode: By default what the checkpoint is for.
        limit: Only the first rows.
        reliance_rows: Rows to tell latent reliance from (STORM only), 200 by default; 0: none.
        readers: Processes that read videos ahead of the model; by default 2, none beside a model on the CPU.
        trust_remote_code: Run code that the checkpoint brings.
        as_json: Print the whole summary, to be read by programs.
    """
    from storm_vlm.data.identity import checkpoint_identity
    from storm_vlm.data.output import exclusive, refuse_input
    from storm_vlm.data.store import Store
    from storm_vlm.data.video import read_video
    from storm_vlm.evaluation.question_set import QuestionSet
    from storm_vlm.evaluation.run_folder import RunError
    from storm_vlm.evaluation.runner import distributed, run
    from storm_vlm.inference.frames import FrameCache, Frames
    from storm_vlm.inference.pipeline import DEFAULT_FRAMES, StormPipeline
    from storm_vlm.inference.remote_chat import RemoteChat

    local = {
        "--max-pixels": max_pixels,
        "--latent-mode": latent_mode,
        "--reliance-rows": reliance_rows,
        "--trust-remote-code": trust_remote_code or None,
    }
    inputs = [source, *([] if base_url else [Path(checkpoint).expanduser()])]
    if out is not None:
        refuse_input(out, inputs)
    if base_url is not None:
        _refuse(local, "a model behind --base-url: leave it out")
    state = distributed()
    if state.num_processes > 1 and out is None:
        raise RunError("several processes meet in a folder: name one with --out")
    with TemporaryDirectory() as unkept, exclusive(folder := out or Path(unkept)):
        read = read_video if frame_cache is None else FrameCache(frame_cache)
        frames = Frames(num_frames or DEFAULT_FRAMES, read)
        # before the model is loaded, which takes longer
        questions = QuestionSet.read(
            source, benchmark, limit, frames=frames, control=control, prompt=prompt
        )
        if state.is_main_process:
            _tell_skipped(questions, source)
        if base_url is None:
            pipeline = StormPipeline.from_pretrained(
                checkpoint,
                device=str(state.device),
                num_frames=num_frames,
                max_pixels=max_pixels,
                latent_mode=latent_mode,
                read=read,
                trust_remote_code=trust_remote_code,
            )
            model, frames = pipeline, Frames(pipeline.collator.videos.num_frames, read)
        else:
            pipeline, model = None, RemoteChat(base_url, checkpoint)
        name = reasoner or default_reasoner(model)
        if name != "latent":
            _refuse({"--reliance-rows": reliance_rows or None}, f"the reasoner {name}")
        found = build_reasoner(name, model, frames, max_new_tokens)
        questions = replace(questions, frames=frames)
        settings = {"model": checkpoint, "reasoner": name}
        if out is not None and base_url is None:
            settings["weights"] = checkpoint_identity(checkpoint, Store(out))
        rows = RELIANCE_ROWS if reliance_rows is None else reliance_rows
        processes = _readers(readers, base_url is None and str(state.device) == "cpu")
        finished = run(folder, found, questions, settings, batch_size, processes)
        if not state.is_main_process:
            return
        try:
            _tell_faults(finished, questions, max_errors)
            if pipeline and name == "latent" and control is None and rows:
                _tell_reliance(pipeline, questions, finished, rows, batch_size, out)
        finally:
            _tell_result(finished.provenance["summary"], as_json)


def _tell_skipped(questions: QuestionSet, source: Path) -> None:
    from storm_vlm.data.check import fault_lines

    if questions.faults:
        count = (
            f"{len(questions.faults)} of {questions.count} rows cannot be asked, and are skipped"
        )
        show(f"{count}:\n{fault_lines(questions.faults, source)}", to=errors)


def _readers(asked: int | None, beside_model: bool) -> int:
    """Processes that read ahead; on the model's own CPU they would take it from the model."""
    if asked is None:
        return 0 if beside_model else 2
    return asked


def _refuse(options: dict[str, Any], mode: str) -> None:
    """An option that would do nothing is an error, not a silence."""
    for name, value in options.items():
        if value is not None:
            raise StormError(f"{name} does nothing with {mode}")


def _tell_result(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(summary)
        return
    share, counts = summary["accuracy"], {"unparsed": summary["unparsed"], **summary["faults"]}
    show(
        f"{share['mean']:.1%} right ({share['low']:.1%} to {share['high']:.1%}) of {summary['n']}, "
        + ", ".join(f"{count:.1%} {name.replace('_', ' ')}" for name, count in counts.items())
    )


def _tell_faults(finished: Run, questions: QuestionSet, max_errors: float) -> None:
    """What went wrong. Raises RunError if that is too much."""
    from storm_vlm.evaluation.run_folder import FAULTS, RunError

    summary, records = finished.provenance["summary"], finished.records
    for name in summary["faults"]:
        show(f"{name.replace('_', ' ')}: {FAULTS[name]}", to=errors)
    unparsed = [r for r in records if r.reply and not r.parsed and not r.reply.fault]
    if unparsed and summary["unparsed"] > MANY_UNPARSED:
        reply = unparsed[0].reply
        show(f"unparsed, e.g. {unparsed[0].id}: {reply.text[:100]!r}" if reply else "", to=errors)
    failed = [record for record in records if record.error]
    for record in [r for r in failed if r.id not in questions.faults][:NAMED]:
        show(f"not asked: {record.id}: {record.error}", to=errors)
    count = (
        len(failed) + questions.count - len(questions.rows)
    )  # lines that hold no row have no record
    if count > max_errors * questions.count:
        raise RunError(
            f"{count} of {questions.count} rows could not be asked, more than --max-errors {max_errors:g} allows"
        )


def _tell_reliance(
    pipeline: StormPipeline,
    questions: QuestionSet,
    finished: Run,
    rows: int,
    batch_size: int,
    out: Path | None,
) -> None:
    """The table of latent reliance, from the run's folder if it is there, else measured and kept there."""
    from storm_vlm.analysis.reliance import sampled_reliance
    from storm_vlm.data.atomic_write import write_json
    from storm_vlm.evaluation.run_folder import RELIANCE, read_reliance
    from storm_vlm.evaluation.verdict import verdict
    from storm_vlm.versions import commit, versions

    about = {key: finished.provenance.get(key) for key in ("weights", "rows")}
    kept = read_reliance(out, about) if out else None
    try:
        found = kept or sampled_reliance(pipeline, questions, finished, rows, batch_size)
    except ValueError as error:
        show(f"no latent reliance: {error}", to=errors)
        return
    print_reliance(errors, found, verdict(found))
    if kept:
        show(f"as {out}/{RELIANCE} has it; without that file it is measured again", to=errors)
    elif out:
        model = finished.provenance["model"]
        named = Path(model).name if Path(model).is_absolute() else model
        made = {"checkpoint": named, **about, "commit": commit(), "versions": versions()}
        write_json(out / RELIANCE, {**made, **asdict(found)})


def lmms_task(
    source: Path,
    out: Path,
    /,
    *,
    benchmark: Benchmark = None,
    prompt: Literal["ours", "official"] = "ours",
) -> None:
    """Make rows or a benchmark a task of lmms-eval, with our scorer; it needs no hub.

    Args:
        source: A JSONL file of rows, or the folder of a published benchmark.
        out: Folder to write, for lmms-eval's --include_path.
        prompt: As for evaluate.
    """
    from storm_vlm.data.output import refuse_model
    from storm_vlm.evaluation.lmms import write_task
    from storm_vlm.evaluation.question_set import QuestionSet
    from storm_vlm.inference.frames import Frames

    refuse_model(out)
    questions = QuestionSet.read(source, benchmark, None, frames=Frames(1), prompt=prompt)
    _tell_skipped(questions, source)
    show(f"wrote task {write_task(out, benchmark or source.stem, questions)}")


def download(benchmark: Annotated[str, part_of(BENCHMARKS)], folder: Path, /) -> None:
    """Fetch a benchmark's questions from the hub (not its videos).

    Args:
        folder: Where to; videos are to be unpacked there.
    """
    hub = BENCHMARKS[benchmark].hub
    if hub is None:
        raise StormError(f"{benchmark} does not say where its questions are published")
    for written in hub.download(folder):
        show(f"wrote {written}")
    show(f"now unpack the videos of {hub.repository} into {folder}, at any depth")
