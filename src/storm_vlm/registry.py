"""Seams for third parties: named parts of one kind, ours and those of other packages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, reduce
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from storm_vlm.errors import StormError

log = logging.getLogger(__name__)
Part = TypeVar("Part")
Registered = TypeVar("Registered")


class UnknownNameError(StormError, ValueError):
    """Nothing is registered under that name; the message lists the names that are."""


class Registry(Mapping[str, Part], Generic[Part]):
    """Parts of one kind by name. Each is imported when it is first asked for.

    Another package adds its own by an entry point of the group ``storm_vlm.<kind>``, or at run time::

        @GENERATORS.register("mine")
        class Mine(Generator): ...

    Config validation, command-line help and docs read the names from here.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None) -> None:
        """``kind``: a plural noun, e.g. "generators". ``builtin``: where ours are, name to "module:attribute"."""
        self.kind = kind
        self._builtin = dict(builtin or {})
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator. Raises ValueError where the name is taken by another part."""

        def add(part: Registered) -> Registered:
            if name in self and self[name] is not part:
                raise ValueError(f"{self.kind}: {name!r} is registered already")
            self._parts[name] = part  # type: ignore[assignment]
            return part

        return add

    def check(self, name: str) -> str:
        """The name itself, for a pydantic ``AfterValidator``. Raises UnknownNameError."""
        if name not in self:
            names = ", ".join(self)
            raise UnknownNameError(f"{self.kind}: there is no {name!r}; choose from {names}")
        return name

    def __getitem__(self, name: str) -> Part:
        """Raises UnknownNameError, and StormError for a part that cannot be imported."""
        if self.check(name) not in self._parts:
            module, _, attributes = self._places[name].partition(":")
            try:
                part: Any = reduce(getattr, attributes.split("."), import_module(module))
            except (ImportError, AttributeError) as error:
                raise StormError(
                    f"{self.kind}: {name!r} cannot be imported from {self._places[name]} ({error}): mend or remove "
                    "the package that brings it"
                ) from error
            self._parts[name] = part
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._builtin, *self._parts, *self._places]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @cached_property
    def _places(self) -> dict[str, str]:
        """Ours count before those of others, and of others the first: no package takes a name from another."""
        places = dict(self._builtin)
        for point in entry_points(group=f"storm_vlm.{self.kind}"):
            if places.setdefault(point.name, point.value) != point.value:
                log.warning(
                    "%s: %r of the package %s is not used, because %s has the name: give it another",
                    self.kind,
                    point.name,
                    point.dist.name if point.dist else point.value,
                    places[point.name],
                )
        return places
