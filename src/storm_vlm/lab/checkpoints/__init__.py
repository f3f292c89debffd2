"""The two small checkpoints that come with the package: `backbone` and, trained from it, `storm`."""

from pathlib import Path
from typing import Literal


def shipped(name: Literal["backbone", "storm"]) -> Path:
    """The folder of a shipped checkpoint."""
    return Path(__file__).parent / name
