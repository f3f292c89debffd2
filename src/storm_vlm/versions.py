"""What a result was made with."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("storm-vlm", "torch", "transformers", "accelerate", "av", "numpy")
CHECKOUT = Path(__file__).parents[2]  # where this package is a checkout's src/storm_vlm


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@cache
def commit() -> str:
    """The git commit of this package's checkout, with `+` if files differ from it; `unknown` where it is none.

    Git runs in no other folder: a repository's own settings can name programs that it starts.
    """
    project = CHECKOUT / "pyproject.toml"
    if not (CHECKOUT / ".git").exists() or not project.is_file():
        return "unknown"
    if 'name = "storm-vlm"' not in project.read_text(encoding="utf-8"):
        return "unknown"
    command = ("git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
