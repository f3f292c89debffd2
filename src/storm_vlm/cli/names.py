"""Options whose values are the names of a registry."""

from __future__ import annotations

from typing import Any

from storm_vlm.registry import Registry


def names(registry: Registry[Any], help: str = "") -> dict[str, Any]:
    """For `typer.Option` and `typer.Argument`: the help lists the names, and any other name is an error."""
    return {
        "metavar": "NAME",
        "help": f"{help} {', '.join(registry)}.".strip(),
        "callback": lambda name: name and registry.check(name),
    }
