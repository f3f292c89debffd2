"""ms-swift: `messages` and `videos`, as LLaMA-Factory has them; a `<video>` that is left out comes first."""

from __future__ import annotations

from storm_vlm.datasets.llama_factory import export
from storm_vlm.datasets.parse import Fields, conversation_rows, one_video, recorded


def convert(item: Fields) -> list[Fields]:
    """One row for each pair of turns, or the row that our own exporter wrote along."""
    if row := recorded(item, export):
        return [row]
    return conversation_rows(item, item.get("messages"), one_video(item), range(0, 2))
