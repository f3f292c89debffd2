"""Where a checkpoint is: a folder, or a name on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoProcessor

from storm_vlm.errors import StormError

ADAPTERS = "adapter_config.json"
SHOWN = 300  # characters of another library's message


class CheckpointError(StormError, ValueError):
    """A checkpoint that is not there, is damaged, or is not whole; names the folder and the mend."""


def checkpoint_path(name: str) -> str:
    """The absolute path of a folder, or a hub name as it is.

    A hub name is `ORGANISATION/NAME`. Whatever else looks like a path, is one, and so is a name whose first part is
    a folder here: a slip of the pen must not load a stranger's model.

    Raises:
        CheckpointError: there is no such folder.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path.absolute())
    try:
        validate_repo_id(name)
        is_path = "/" not in name or Path(path.parts[0]).is_dir()
    except HFValidationError:
        is_path = True
    if is_path:
        raise CheckpointError(
            f"no such folder: {name} (a checkpoint is a folder, or ORGANISATION/NAME on the hub)"
        )
    return name


def base_of(folder: Path) -> str:
    """The checkpoint that a folder of adapters was trained on.

    A relative path that leads nowhere from here may start at the adapters' own folder.

    Raises:
        CheckpointError: it names none, or one that is not there.
    """
    try:
        base = json.loads((folder / ADAPTERS).read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise CheckpointError(f"{folder / ADAPTERS} is damaged: copy it again ({error})") from error
    mend = f"write its path into base_model_name_or_path of {folder / ADAPTERS}"
    if not base:
        raise CheckpointError(f"{folder} holds adapters and does not say of which model: {mend}")
    beside = folder / base
    try:
        return str(beside) if beside.is_dir() and not Path(base).is_dir() else checkpoint_path(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"the adapters of {folder} need their base: {error}: {mend}"
        ) from error


@contextmanager
def loading(name: str, part: str = "") -> Iterator[None]:
    """Whatever transformers meets in a damaged or foreign checkpoint, or on the way to the hub, is one sentence.

    Raises CheckpointError.
    """
    try:
        yield
    except StormError:
        raise
    except (
        Exception
    ) as error:  # of many classes: what a file says decides which line is the first to stumble
        told = " ".join(str(error).split())[:SHOWN]
        mend = "mend its files, or copy them again"
        if not Path(name).is_dir():
            mend = "see whether the hub has it and can be reached, or name a folder"
        raise CheckpointError(
            f"{part}{name} cannot be loaded ({type(error).__name__}: {told}): {mend}"
        ) from error


def load_processor(name: str, **kwargs: Any) -> Any:
    """The processor of a checkpoint; adapters without one have their base's.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(checkpoint_path(name))
    if (path / ADAPTERS).is_file() and not list(path.glob("*processor_config.json")):
        return load_processor(base_of(path), **kwargs)
    with loading(name, "the processor of "):
        return AutoProcessor.from_pretrained(str(path) if path.is_dir() else name, **kwargs)
