"""`storm build …`: data construction; `storm bench build`: is nothing lost, and how fast is it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup


class _AllSteps(TyperGroup):
    """`storm build --source …` is `storm build run --source …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        whole = bool(args) and args[0].startswith("-") and args[0] != "--help"
        return super().parse_args(ctx, ["run", *args] if whole else args)


app = typer.Typer(
    cls=_AllSteps,
    no_args_is_help=True,
    help="From rows to training rows: keyframes, plans, prompts, thought videos, filters. All can be interrupted "
    "and run again; nothing is paid twice.",
)
console = Console()
STOPPED, ALL_REJECTED = {"budget": 3, "unanswered": 4}, 5  # exit codes

Source = Annotated[Path, typer.Option(help="A JSONL file of rows.")]
Out = Annotated[Path, typer.Option(help="Folder for rows.jsonl, rejects.jsonl, summary.json.")]
StoreFolder = Annotated[
    Path | None, typer.Option("--store", help="Finished work; by default in OUT. May be shared.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file of settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value, e.g. keyframes=4 generator=wan generator_config.steps=4 filters.blank=0.05"
    ),
]


def _config(path: Path | None, overrides: list[str] | None, **flags: Any) -> Any:
    from storm_vlm.configs import parse_config
    from storm_vlm.construction.config import BuildConfig

    given = [f"{name.replace('__', '.')}={value}" for name, value in flags.items() if value]
    return parse_config(BuildConfig, path, given + (overrides or []))


def _add(name: str, steps: str, help: str) -> None:
    def verb(
        source: Source,
        out: Out,
        overrides: Overrides = None,
        config: ConfigFile = None,
        store: StoreFolder = None,
        model: Annotated[
            str, typer.Option(help="The teacher, e.g. gpt-4o; none: keyframes are spread evenly.")
        ] = "",
        base_url: Annotated[
            str, typer.Option(help="Of any OpenAI-compatible server; default: OpenAI's.")
        ] = "",
        max_cost: Annotated[
            float | None, typer.Option(help="Stop before a call when as much is spent; see prices.")
        ] = None,
        price_in: Annotated[float, typer.Option(help="Per million prompt tokens.")] = 0.0,
        price_out: Annotated[float, typer.Option(help="Per million completion tokens.")] = 0.0,
        workers: Annotated[int | None, typer.Option(min=1, help="Rows in work at a time.")] = None,
        shard: Annotated[
            str, typer.Option(help="i/n: only this part; join with `storm build collect`.")
        ] = "",
        ray: Annotated[
            str, typer.Option(help="Run on Ray: an address, auto, or local for this machine.")
        ] = "",
    ) -> None:
        from storm_vlm.construction.build import Shard, run

        settings = _config(
            config,
            overrides,
            steps=steps,
            teacher__model=model,
            teacher__base_url=base_url,
            teacher__max_cost=max_cost,
            teacher__price_in=price_in,
            teacher__price_out=price_out,
            workers=workers,
        )
        work: Callable[..., Any] | None = None
        if ray:
            from storm_vlm.construction.ray_build import on_ray

            work = on_ray(ray)
        part = Shard.parse(shard) if shard else None
        _report(run(source, out, settings, part, store, work), out)

    app.command(name, help=help)(verb)


_add("run", "[keyframes, plans, prompts, thoughts, filter]", "All steps.")
_add("keyframes", "[keyframes]", "Choose the frames that matter, by the teacher or evenly.")
_add("plans", "[plans]", "Write the reasoning from keyframes to answer, by the teacher.")
_add("prompts", "[prompts]", "Rewrite plans as what a video generator is told.")
_add("thoughts", "[thoughts]", "Make thought videos.")
_add("filter", "[filter]", "Reject rows whose thought video is blank, frozen, off …")


@app.command()
def collect(
    source: Source,
    out: Out,
    overrides: Overrides = None,
    config: ConfigFile = None,
    store: StoreFolder = None,
) -> None:
    """Write the rows that the store holds, e.g. after all shards; with the settings of the run."""
    from storm_vlm.construction.build import collect as collect_rows

    _report(collect_rows(source, out, _config(config, overrides), store), out)


def bench_build(
    results: Annotated[Path | None, typer.Option(help="JSON file for the record.")] = None,
    kills: Annotated[int, typer.Option(min=1)] = 40,
    rows: Annotated[int, typer.Option(min=4, help="Of the micro world.")] = 48,
    workers: Annotated[
        list[int] | None, typer.Option("--workers", help="Repeat for each; 1, 2, 4, 8, 16.")
    ] = None,
    latency: Annotated[float, typer.Option(help="Seconds that the stub teacher takes.")] = 0.1,
    ray: Annotated[bool, typer.Option(help="Compare with a local Ray cluster, too.")] = True,
) -> None:
    """Kill data construction at random, count what is lost or paid twice; rows per second by workers."""
    from storm_vlm.lab.bench.construction import bench_build as measure

    console.print_json(
        data=measure(results, kills, rows, workers or [1, 2, 4, 8, 16], latency, ray)
    )


def _report(summary: dict[str, Any], out: Path) -> None:
    """Print totals; the exit code says if rows are unfinished."""
    hidden = ("config", "versions", "source", "commit")
    console.print_json(data={name: value for name, value in summary.items() if name not in hidden})
    console.print(f"wrote {out}", soft_wrap=True)
    if why := summary.get("stopped"):
        told = {
            "budget": "stopped at max_cost; all that is finished is kept: raise it to go on",
            "unanswered": "the teacher did not answer for some rows: run again to finish them",
        }
        console.print(told[why])
        raise typer.Exit(STOPPED[why])
    if summary.get("unfinished"):
        console.print("unfinished rows are not in this store, as these settings would make them")
    elif summary["rows"] and summary.get("kept") == 0:
        console.print(f"every row was rejected: {out / 'rejects.jsonl'} says why", soft_wrap=True)
        raise typer.Exit(ALL_REJECTED)
