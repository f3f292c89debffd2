"""Frozen configs out of YAML files and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from storm_vlm.errors import StormError


class Settings(BaseModel):
    """Base of all configs: nothing unknown, nothing changed after it is made, no `nan`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    #: an override of one of these keys drops the other, which says the same in another way
    ALTERNATIVES: ClassVar[dict[str, str]] = {}


Config = TypeVar("Config", bound=Settings)


class ConfigError(StormError, ValueError):
    """A config that cannot be used; names the file, the key and the mend."""


class _Loader(yaml.SafeLoader):
    """Takes `1e-4` for a number, as everybody but YAML 1.1 does, and a key only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_config(
    kind: type[Config], path: str | Path | None, *overrides: Iterable[str] | Mapping[str, Any]
) -> Config:
    """Read a YAML file, then change it. Without a path, the overrides are all there is.

    Args:
        kind: The config's class.
        path: Of the file.
        overrides: One after the other: `key=value` as people type it, the value read by the field's type; or a
            mapping of keys to values. Dots in a key are nesting: `training.max_steps=10`.

    Raises:
        ConfigError: unreadable, an unknown key, or a value of the wrong kind.
    """
    raw = _read(Path(path)) if path else {}
    for change in overrides:
        if isinstance(change, Mapping):
            values = list(change.items())
        else:
            values = [_parse_override(kind, text) for text in change]
        for key, value in values:
            if key in kind.ALTERNATIVES:
                parent, _, other = kind.ALTERNATIVES[key].rpartition(".")
                ((raw.get(parent) or {}) if parent else raw).pop(other, None)
            _set(raw, key, value)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = [
            _fault(kind, fault["loc"], fault["type"], fault["msg"]) for fault in error.errors()
        ]
        raise ConfigError(f"{path or 'config'}: {'; '.join(faults)}") from error


def _set(place: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        place[parent] = {} if place.get(parent) is None else place[parent]
        place = place[parent]
        if not isinstance(place, dict):
            raise ConfigError(f"{parent} is {place!r}: it has no part, so {key} cannot be set")
    place[last] = value


def _fault(kind: type[BaseModel], place: tuple[int | str, ...], type_: str, message: str) -> str:
    key = ".".join(map(str, place))
    if type_ != "extra_forbidden":
        return f"{key}: {message}" if key else message.removeprefix("Value error, ")
    models = _models(_types(kind, [str(part) for part in place[:-1]]))
    near = get_close_matches(str(place[-1]), models[0].model_fields, 1) if models else ()
    return f"there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = _load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"there is no config {path}") from None
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {_one_line(error)}") from error
    if not isinstance(raw or {}, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, not {raw!r:.40}")
    return raw or {}


def _parse_override(kind: type[BaseModel], text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override is key=value, got {text!r}")
    types = _types(kind, key.split("."))
    if NoneType in types and value in ("null", "None"):
        return key, None
    if str in types or any(get_origin(part) is Literal for part in types):
        return key, value
    try:
        parsed = _load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {text!r} cannot be read: {_one_line(error)}") from error
    if isinstance(parsed, (bool, int, float, NoneType)) or value[0] in "[{\"'":
        return key, parsed
    return key, value  # no comment, no date, no mapping without braces


def _types(kind: Any, keys: list[str]) -> tuple[Any, ...]:
    """What a key's value may be; nothing where the config does not say (an unknown key, a part of a mapping)."""
    types: tuple[Any, ...] = (kind,)
    for key in keys:
        models = _models(types)
        if not models or key not in models[0].model_fields:
            return ()
        annotation = models[0].model_fields[key].annotation
        union = get_origin(annotation) in (Union, UnionType)
        types = get_args(annotation) if union else (annotation,)
    return types


def _models(types: Iterable[Any]) -> list[type[BaseModel]]:
    return [part for part in types if isinstance(part, type) and issubclass(part, BaseModel)]


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        return f"{error.problem}{line}"
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
