"""What an input is: its content, never its path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.model.checkpoint import ADAPTERS, base_of, checkpoint_path

DECISIVE = (
    "*.safetensors",
    "*.bin",
    "*config.json",
    "tokenizer*",
    "chat_template*",
)  # of a checkpoint


def checkpoint_identity(name: str, store: Store) -> str:
    """Hash of the files that decide what a checkpoint answers, its base's included; a hub name's is its commit.

    `store` remembers the hashes of files. Raises OSError, CheckpointError.
    """
    folder = Path(checkpoint_path(name))
    if not folder.is_dir():
        config = try_to_load_from_cache(name, "config.json")
        return Path(config).parent.name if isinstance(config, str) else name
    files = sorted({file for pattern in DECISIVE for file in folder.glob(pattern)})
    base = base_of(folder) if (folder / ADAPTERS).is_file() else None
    return key_of(
        files={file.name: store.content(file) for file in files},
        base=base and checkpoint_identity(base, store),
    )


def clip_identity(path: str) -> str | None:
    """Size and time of change: reading every byte of a benchmark's clips would take hours. None: it is not there."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # a name with a zero byte is none
        return None
    return f"{state.st_size} {state.st_mtime_ns}"


def rows_identity(rows: Iterable[Row]) -> str:
    """Hash of what rows say, wherever their files lie, and of these files."""
    return key_of(
        rows=[
            [
                row.model_dump(mode="json", exclude={"video": True, "thought_video": {"path"}}),
                clip_identity(row.video),
                clip_identity(row.thought_video.path) if row.thought_video else None,
            ]
            for row in rows
        ]
    )
