"""Seams for third parties: named parts of one kind, ours and those of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from storm_vlm.errors import StormError

Part = TypeVar("Part")
Registered = TypeVar("Registered")


class UnknownNameError(StormError, ValueError):
    """Nothing is registered under that name; the message lists the names that are."""


class Registry(Mapping[str, Part], Generic[Part]):
    """Parts of one kind by name. Each is imported when it is first asked for.

    Another package adds its own by an entry point of the group ``storm_vlm.<kind>``, or at run time::

        @GENERATORS.register("mine")
        class Mine: ...

    Config validation, command-line help and docs read the names from here.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str]) -> None:
        """``kind``: a plural noun, e.g. "generators". ``builtin``: where ours are, name to "module:attribute"."""
        self.kind = kind
        self._places: dict[str, str] | None = None
        self._builtin = dict(builtin)
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator. Raises ValueError where the name is taken by another part."""

        def add(part: Registered) -> Registered:
            if name in self and self[name] is not part:
                raise ValueError(f"{self.kind}: {name!r} is registered already")
            self._parts[name] = part  # type: ignore[assignment]
            return part

        return add

    def __getitem__(self, name: str) -> Part:
        """Raises UnknownNameError."""
        if name not in self._parts:
            if name not in self._where():
                raise UnknownNameError(
                    f"{self.kind}: there is no {name!r}; choose from {', '.join(self)}"
                )
            module, _, attribute = self._where()[name].partition(":")
            found: Any = import_module(module)
            for step in attribute.split("."):
                found = getattr(found, step)
            self._parts[name] = found
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._where()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._where(), *self._parts]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def check(self, name: str) -> str:
        """The name itself, for a pydantic ``AfterValidator``. Raises UnknownNameError."""
        if name not in self:
            raise UnknownNameError(
                f"{self.kind}: there is no {name!r}; choose from {', '.join(self)}"
            )
        return name

    def _where(self) -> dict[str, str]:
        """Ours first: no other package can take a name of ours away."""
        if self._places is None:
            others = {
                point.name: point.value for point in entry_points(group=f"storm_vlm.{self.kind}")
            }
            self._places = others | self._builtin
        return self._places
