"""How verbs take options and talk: one way to print, one to name a part of a registry."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cyclopts import Group, Parameter
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from storm_vlm.registry import Registry


class Terminal(Console):
    """No control character of a text, a table's cell or a file's name passes, such as one that colours or clears."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(_plain(segment.text), segment.style)


class Messages(logging.Handler):
    """Log records, each as plain text beside what a verb prints."""

    def emit(self, record: logging.LogRecord) -> None:
        for bar in _bars():
            bar.clear()  # it draws itself again
        show(record.getMessage(), to=errors)


console, errors = Terminal(), Terminal(stderr=True)  # what a verb is for; what is beside it

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
    """Print plain text: `[x]` is no markup, and long paths stay whole."""
    text = "\n".join(map(str, lines))
    to.print(_plain(text), markup=False, highlight=False, soft_wrap=True, emoji=False)


def stop_bars() -> None:
    """End the lines of progress bars that an error left as they were."""
    for bar in _bars():
        bar.delay = 0  # else one that was drawn early is not ended
        bar.close()


def _bars() -> list[Any]:
    tqdm = sys.modules.get("tqdm")
    return list(tqdm.tqdm._instances) if tqdm else []


def _plain(text: str) -> str:
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def show_json(value: Any) -> None:
    """Print a result to be read by programs: one line in a pipe, indented on a screen."""
    print(json.dumps(value, default=asdict, indent=2 if console.is_terminal else None))  # noqa: T201


def part_of(registry: Registry[Any], help: str = "") -> Parameter:
    """An option that names a part of a registry, ours or another package's."""

    def check(_: Any, name: str | None) -> None:
        if name is not None:
            registry.check(name)

    return Parameter(help=f"{help} One of {', '.join(registry)}.".strip(), validator=check)
