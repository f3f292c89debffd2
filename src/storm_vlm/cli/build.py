"""`storm build …`: data construction, all of it or one step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.types import NormFloat, PositiveInt

from storm_vlm.cli.terminal import DATA, Fields, console, show
from storm_vlm.configs import parse_config
from storm_vlm.construction.config import BuildConfig, TeacherConfig

NO_TEACHER = TeacherConfig.model_validate({})
STOPPED, ALL_REJECTED = {"budget": 3, "unanswered": 4}, 5  # exit codes
STEPS = {
    "run": ("All steps; the default.", None),
    "keyframes": ("Choose the frames that matter, by the teacher or evenly.", ("keyframes",)),
    "plans": ("Write the reasoning from keyframes to answer, by the teacher.", ("plans",)),
    "prompts": ("Rewrite plans as what a video generator is told.", ("prompts",)),
    "thoughts": ("Make thought videos.", ("thoughts",)),
    "filter": ("Reject rows whose thought video is blank, frozen, off …", ("filter",)),
}
app = App(
    name="build",
    group=DATA,
    help="From rows to training rows: keyframes, plans, prompts, thought videos, filters. All can be interrupted "
    "and run again; nothing is paid twice.",
    help_epilogue="Exit codes: 0 done, 1 error, 2 wrong options, 3 stopped at --max-cost, 4 some rows are "
    "unfinished, 5 every row was rejected.",
)
Overrides = Annotated[
    str,
    Parameter(
        help="key=value, e.g. keyframes=4 generator=wan generator_config.steps=4 filters.blank=0.05"
    ),
]
Source = Annotated[Path, Parameter(help="A JSONL file of rows.")]
Out = Annotated[Path, Parameter(help="Folder for rows.jsonl, rejects.jsonl, summary.json.")]
ConfigFile = Annotated[Path | None, Parameter(help="A YAML file of settings.")]
StoreFolder = Annotated[
    Path | None, Parameter(help="Finished work; by default in OUT. May be shared.")
]


def _add(name: str, help: str, steps: tuple[str, ...] | None) -> None:
    def verb(
        *overrides: Overrides,
        source: Source,
        out: Out,
        config: ConfigFile = None,
        store: StoreFolder = None,
        teacher: Annotated[TeacherConfig, Fields] = NO_TEACHER,
        workers: PositiveInt | None = None,
        max_errors: NormFloat | None = None,
        shard: str | None = None,
        ray: str | None = None,
    ) -> int:
        """Data construction.

        Args:
            workers: Rows in work at a time; 8 by default.
            max_errors: Share of rows that may be odd (no row, no clip, ...); more is an error, before any call.
            shard: i/n: only this part; join with `storm build collect`.
            ray: Run on Ray: an address, auto, or local for this machine.
        """
        from storm_vlm.construction.build import Shard, run

        given: dict[str, Any] = {
            f"teacher.{field}": getattr(teacher, field) for field in teacher.model_fields_set
        }
        given |= {"steps": steps} if steps else {}
        given |= {"workers": workers} if workers else {}
        given |= {} if max_errors is None else {"max_errors": max_errors}
        settings = parse_config(BuildConfig, config, given, overrides)
        work = None
        if ray:
            from storm_vlm.construction.ray_build import on_ray

            work = on_ray(ray)
        part = Shard.parse(shard) if shard else None
        return _report(run(source, out, settings, part, store, work), out)

    app.command(verb, name=name, help=help)
    if not steps:
        app.default(verb)  # `storm build --source …` is `storm build run --source …`


for name, (help, steps) in STEPS.items():
    _add(name, help, steps)


@app.command
def collect(
    *overrides: Overrides,
    source: Source,
    out: Out,
    config: ConfigFile = None,
    store: StoreFolder = None,
) -> int:
    """Write the rows that the store holds, e.g. after all shards; with the settings of the run."""
    from storm_vlm.construction.build import collect as collect_rows

    settings = parse_config(BuildConfig, config, overrides)
    return _report(collect_rows(source, out, settings, store), out)


def _report(summary: dict[str, Any], out: Path) -> int:
    """Print totals; the exit code says if rows are unfinished."""
    hidden = ("config", "versions", "source", "commit")
    console.print_json(data={name: value for name, value in summary.items() if name not in hidden})
    if own := summary.get("own_thought_videos"):
        show(f"{own} of {summary['kept']} kept rows have the thought video that they came with")
    show(f"wrote {out}")
    if why := summary.get("stopped"):
        told = {
            "budget": "stopped at max_cost; all that is finished is kept: raise it to go on",
            "unanswered": "the teacher did not answer for some rows: run again to finish them",
        }
        show(told[why])
        return STOPPED[why]
    if summary.get("asked_again"):
        show(
            f"the teacher gave {summary['asked_again']} rows nothing usable ({out / 'rejects.jsonl'} says what it "
            "wrote): the next run asks again"
        )
    if summary.get("unfinished"):
        show("unfinished rows are not in this store, as these settings would make them")
        return STOPPED["unanswered"]
    if summary["rows"] and summary.get("kept") == 0:
        show(f"every row was rejected: {out / 'rejects.jsonl'} says why")
        return ALL_REJECTED
    return 0
