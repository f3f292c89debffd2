"""Frozen configs out of YAML files and `key=value` overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from storm_vlm.errors import StormError

Config = TypeVar("Config", bound=BaseModel)


class ConfigError(StormError, ValueError):
    """A config file that cannot be used; names the file, the key and the mend."""


class _Loader(yaml.SafeLoader):
    """PyYAML takes `1e-4` for a string (YAML 1.1 wants `1.0e-4`); everybody else takes it for a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_config(
    kind: type[Config], path: str | Path | None, overrides: list[str] | None = None
) -> Config:
    """Read a YAML file; `overrides` are `key=value` with dots for nesting. Without a path, they are all there is.

    Raises:
        ConfigError: unreadable, an unknown key, or a value of the wrong kind.
    """
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
        raw = yaml.load(text, _Loader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"an override is key=value, got {override!r}")
        *parents, last = key.split(".")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.load(value, _Loader)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'config'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ConfigError(f"{path or 'config'}: {faults}") from error
