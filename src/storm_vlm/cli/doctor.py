"""`storm doctor`: what a bug report should say about the machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Any

from packaging.requirements import Requirement

from storm_vlm.cli.terminal import Json, show, show_json

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_ENDPOINT")


def doctor(*, as_json: Annotated[bool, Json] = False) -> None:
    """Versions, devices, threads, and which optional packages are installed: paste it into a bug report.

    Args:
        as_json: Print it as JSON.
    """
    facts = examine()
    if as_json:
        show_json(facts)
        return
    for heading, values in facts.items():
        show(f"{heading}:", *(f"  {name}: {value}" for name, value in values.items()))


def examine() -> dict[str, dict[str, Any]]:
    """What is installed and at hand, by heading."""
    import torch

    from storm_vlm.model.backbones import BACKBONES
    from storm_vlm.versions import commit

    gpus = range(torch.cuda.device_count())
    return {
        "storm": {
            "version": version("storm-vlm"),
            "commit": commit(),
            "trains": ", ".join(BACKBONES),
        },
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads of torch": torch.get_num_threads(),
            **{name: os.environ[name] for name in VARIABLES if name in os.environ},
        },
        "devices": {f"cuda:{n}": torch.cuda.get_device_name(n) for n in gpus}
        or {"cpu": "no GPU is visible"},
        "packages": _packages(),
        "programs": {name: shutil.which(name) or "not found" for name in ("ffmpeg", "git")},
    }


def _packages() -> dict[str, str]:
    """Version of each package that ours names; what an optional one is for, where it is missing."""
    found: dict[str, str] = {}
    for requirement in map(Requirement, requires("storm-vlm") or ()):
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
        if requirement.name == "storm-vlm" or (extra and extra[1] == "dev"):
            continue
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            needed = f"storm-vlm[{extra[1]}]" if extra else "storm-vlm"
            found[requirement.name] = f"not installed (pip install '{needed}')"
    return dict(sorted(found.items()))
