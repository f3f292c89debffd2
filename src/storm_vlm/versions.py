"""What a result was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

PACKAGES = ("storm-vlm", "torch", "transformers", "accelerate", "av", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def commit() -> str:
    """The git commit of the working folder, with `+` if files differ from it; `unknown` outside a checkout."""
    try:
        run = ("git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
