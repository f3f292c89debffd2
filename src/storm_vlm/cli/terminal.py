"""How verbs take options and talk: one way to print, one to name a part of a registry."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from cyclopts import Group, Parameter
from rich.console import Console

from storm_vlm.registry import Registry

console, errors = Console(), Console(stderr=True)  # what a verb is for; what is beside it

#: Headings of `storm --help`.
USE, DATA, TRAINING, EVALUATION, LAB = (
    Group.create_ordered(name) for name in ("Use", "Data", "Training", "Evaluation", "Laboratory")
)
#: A config's fields are options of the verb that takes it, with their types, ranges, defaults and descriptions.
Fields = Parameter(name="*")
#: A switch without a `--no-…`.
Switch = Parameter(negative="")
Json = Parameter("--json", negative="")


def show(*lines: object, to: Console = console) -> None:
    """Print plain text: `[x]` is no markup, long paths stay whole, and no control character passes."""
    text = "\n".join(map(str, lines))
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    to.print(shown, markup=False, highlight=False, soft_wrap=True, emoji=False)


def show_json(value: Any) -> None:
    """Print a result to be read by programs: one line in a pipe, indented on a screen."""
    print(json.dumps(value, default=asdict, indent=2 if console.is_terminal else None))  # noqa: T201


def part_of(registry: Registry[Any], help: str = "") -> Parameter:
    """An option that names a part of a registry, ours or another package's."""

    def check(_: Any, name: str | None) -> None:
        if name is not None:
            registry.check(name)

    return Parameter(help=f"{help} One of {', '.join(registry)}.".strip(), validator=check)
