"""What a verb writes to: not what it reads, a place that can be written to, and one process's at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from storm_vlm.errors import InputError


class OutputError(InputError):
    """A place that must not, or cannot, be written to; names it and the mend."""


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Before any work: no file to be written is one to be read, and each can be written.

    Raises:
        OutputError: an output is an input (by whatever name), or a folder.
        OSError: its folder cannot be made, or written to.
    """
    read = [path for path in inputs if path and os.path.exists(path)]
    for output in filter(None, outputs):
        refuse_input(output, read)
        if output.is_dir():
            raise OutputError(f"{output} is a folder: name a file to write")
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.absolute().parent, os.W_OK):
            raise PermissionError(13, "Cannot be written to", str(output.absolute().parent))


def refuse_input(output: Path, inputs: Iterable[str | Path]) -> None:
    """Raises OutputError if the output is one of the inputs, by whatever name."""
    for path in inputs:
        if output.exists() and os.path.exists(path) and os.path.samefile(output, path):
            raise OutputError(f"{output} is read, and would be overwritten: choose another output")


def refuse_model(folder: Path) -> None:
    """Raises OutputError for a folder that holds a model: nothing but its training writes there."""
    if held := model_files(folder):
        raise OutputError(
            f"{folder} holds a model ({held[0].name}), and is not to be written to: choose another folder"
        )


def model_files(folder: Path) -> list[Path]:
    """The weights in a folder."""
    return [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]


@contextmanager
def exclusive(folder: Path, part: str = "") -> Iterator[None]:
    """The folder, or a part of it, for this process alone, as `locked`. Raises OutputError for a model's, too."""
    refuse_model(folder)
    with locked(folder, part):
        yield


@contextmanager
def locked(folder: Path, part: str = "") -> Iterator[None]:
    """The folder, or a part of it, for this process alone; it is made if it is not there.

    Processes that one launcher started share it, and a process may ask again for what it has. A killed process
    leaves nothing that would be in the way.

    Raises:
        OutputError: another process has it.
        OSError: it cannot be made, or written to.
    """
    if int(os.environ.get("RANK", 0)):  # the launch's first process holds it for all
        yield
        return
    if folder.is_file():
        raise OutputError(f"{folder} is a file: name a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / (f".{part}-lock" if part else ".lock"), is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        what = f"{part} of {folder}" if part else folder
        raise OutputError(
            f"another process is at work on {what}: wait for it, or choose another output"
        ) from None
    try:
        yield
    finally:
        lock.release()
