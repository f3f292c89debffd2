"""`storm evaluate`, and the benches of reasoners."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from storm_vlm.cli.analyze import print_reliance
from storm_vlm.cli.names import names
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.controls import CONTROLS
from storm_vlm.inference.reasoners import REASONERS, build_reasoner, default_reasoner

if TYPE_CHECKING:
    from storm_vlm.evaluation.exam import Exam
    from storm_vlm.evaluation.run_folder import Run
    from storm_vlm.inference.pipeline import StormPipeline

app = typer.Typer()
bench = typer.Typer()
console = Console()
errors = Console(stderr=True)
BenchmarkName = Annotated[
    str | None,
    typer.Option(**names(BENCHMARKS, "Which one the folder holds:")),
]


@app.command()
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder or hub name; with --base-url, the model's name there.")
    ],
    source: Annotated[
        Path,
        typer.Argument(help="A JSONL file of rows, or the folder of a published benchmark."),
    ],
    benchmark: BenchmarkName = None,
    reasoner: Annotated[
        str | None,
        typer.Option(
            **names(REASONERS, "Default: latent for a checkpoint with slots, else direct. Of:")
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Of an OpenAI-compatible server, ending in /v1.")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            **names(CONTROLS, "Take away what a model that watches the video would need:")
        ),
    ] = None,
    prompt: Annotated[
        Literal["ours", "official"], typer.Option(help="official: the benchmark's own text.")
    ] = "ours",
    out: Annotated[
        Path | None, typer.Option(help="Folder to keep every answer in; a killed run goes on.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --base-url: requests at once.")] = 8,
    max_errors: Annotated[
        float, typer.Option(help="Share of rows that may fail to be asked; more is an error.")
    ] = 0.01,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a turn; by default the reasoner's.")
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Default: as trained, else 32.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Of a frame; default: the processor's.")
    ] = None,
    frame_cache: Annotated[
        Path | None, typer.Option(help="Folder to keep decoded frames in.")
    ] = None,
    latent_mode: Annotated[
        Literal["force", "auto", "off"] | None,
        typer.Option(help="Default: what the checkpoint is for."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    reliance_rows: Annotated[
        int, typer.Option(min=0, help="Rows to tell latent reliance from (STORM only); 0: none.")
    ] = 200,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that the checkpoint brings.")
    ] = False,
) -> None:
    """Accuracy with intervals on a file of rows or a benchmark; under `accelerate launch` on many GPUs."""
    from storm_vlm.data.video import read_video
    from storm_vlm.evaluation.exam import Exam
    from storm_vlm.evaluation.run_folder import RunError
    from storm_vlm.evaluation.runner import distributed, run
    from storm_vlm.inference.frames import FrameCache, Frames
    from storm_vlm.inference.pipeline import DEFAULT_FRAMES, StormPipeline
    from storm_vlm.inference.remote_chat import RemoteChat

    state = distributed()
    if state.num_processes > 1 and out is None:
        raise RunError("several processes meet in a folder: name one with --out")
    read = read_video if frame_cache is None else FrameCache(frame_cache)
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
        model, num_frames = pipeline, pipeline.collator.videos.num_frames
    else:
        pipeline, model = None, RemoteChat(base_url, checkpoint)
    frames = Frames(num_frames or DEFAULT_FRAMES, read)
    name = reasoner or default_reasoner(model)
    found = build_reasoner(name, model, frames, max_new_tokens)
    exam = Exam.read(source, benchmark, limit, frames=frames, control=control, prompt=prompt)
    settings = {"model": checkpoint, "reasoner": name}
    with TemporaryDirectory() as unkept:
        finished = run(out or Path(unkept), found, exam, settings, batch_size)
    if not state.is_main_process:
        return
    _tell(finished, max_errors)
    if pipeline and name == "latent" and control is None and reliance_rows:
        _tell_reliance(pipeline, exam, finished, reliance_rows, batch_size, out)


def _tell(finished: Run, max_errors: float) -> None:
    """The summary, and what went wrong. Raises RunError if that is too much."""
    from storm_vlm.evaluation.run_folder import RunError

    summary = finished.provenance["summary"]
    console.print_json(data=summary)
    low, high = summary["interval"]
    errors.print(  # beside the JSON, for people
        f"{summary['accuracy']:.1%} right ({low:.1%} to {high:.1%}) of {summary['n']}, "
        f"{summary['unparsed']:.1%} unparsed"
    )
    records = finished.records
    failed = [record for record in records if record.error]
    for record in failed:
        told = escape(f"{record.id}: {record.error}")
        errors.print(f"[red]not asked:[/red] {told}", highlight=False, soft_wrap=True)
    if len(failed) > max_errors * len(records):
        raise RunError(
            f"{len(failed)} of {len(records)} rows could not be asked, more than --max-errors {max_errors:g} allows"
        )


def _tell_reliance(
    pipeline: StormPipeline, exam: Exam, finished: Run, rows: int, batch_size: int, out: Path | None
) -> None:
    """The table of latent reliance, from the run's folder if it is there, else measured and kept there."""
    from storm_vlm.analysis.sampled_reliance import sampled_reliance
    from storm_vlm.data.atomic_write import write_json
    from storm_vlm.evaluation.run_folder import RELIANCE, read_reliance
    from storm_vlm.versions import commit, versions

    kept = read_reliance(out) if out else None
    try:
        found = kept or sampled_reliance(pipeline, exam, finished, rows, batch_size)
    except ValueError as error:
        errors.print(f"no latent reliance: {error}", markup=False, soft_wrap=True)
        return
    print_reliance(errors, found)
    if kept:
        errors.print(f"as {out}/{RELIANCE} has it; without that file it is measured again")
    elif out:
        model = finished.provenance["model"]
        named = Path(model).name if Path(model).is_absolute() else model
        made = {"checkpoint": named, "commit": commit(), "versions": versions()}
        write_json(out / RELIANCE, {**made, **asdict(found)})


@app.command()
def lmms_task(
    source: Annotated[
        Path,
        typer.Argument(help="A JSONL file of rows, or the folder of a published benchmark."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write, for lmms-eval's --include_path.")],
    benchmark: BenchmarkName = None,
    prompt: Annotated[Literal["ours", "official"], typer.Option(help="As for evaluate.")] = "ours",
) -> None:
    """Make rows or a benchmark a task of lmms-eval, with our scorer; it needs no hub."""
    from storm_vlm.evaluation.exam import Exam
    from storm_vlm.evaluation.lmms import write_task
    from storm_vlm.inference.frames import Frames

    exam = Exam.read(source, benchmark, None, frames=Frames(1), prompt=prompt)
    console.print(f"wrote task {write_task(out, benchmark or source.stem, exam)}")


@bench.command("latency")
def bench_latency(
    shape: Annotated[
        Literal["micro", "3b", "7b"],
        typer.Option(help="micro: the shipped model; else random weights and a synthetic clip."),
    ] = "micro",
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    rows: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 4,
    cot_tokens: Annotated[int, typer.Option(min=1, help="Of a chain of thought.")] = 300,
    grounded_tokens: Annotated[int, typer.Option(min=1, help="Of a grounded one.")] = 500,
    tool_rounds: Annotated[int, typer.Option(min=1, max=5, help="Looks, then an answer.")] = 3,
    tool_tokens: Annotated[int, typer.Option(min=50, help="Of the turn before a look.")] = 150,
    results: Annotated[Path | None, typer.Option(help="JSON file for the record.")] = None,
) -> None:
    """Seconds an item of each way to reason, at fixed lengths, on one model and the same rows."""
    from storm_vlm.lab.bench.latency import Lengths, latency_tables
    from storm_vlm.lab.bench.latency import bench_latency as run

    lengths = Lengths(answer_tokens, cot_tokens, grounded_tokens, tool_rounds, tool_tokens)
    found = run(shape, device, rows, rounds, batch_size, lengths, results)
    console.print(*latency_tables(found))


@bench.command("reasoners")
def bench_reasoners(
    results: Annotated[Path, typer.Option(help="JSON file for the record.")] = Path(
        "docs/results/reasoners.json"
    ),
    rows: Annotated[
        int, typer.Option(min=2, help="Questions of the micro world's test split.")
    ] = 400,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a chain of thought's turn.")] = 64,
) -> None:
    """Accuracy of each way to reason on the micro world, and of the shipped STORM under controls."""
    from storm_vlm.lab.bench.reasoners import bench_reasoners as run

    console.print_json(data=run(results, rows, batch_size, max_new_tokens)["arms"])
