"""ms-swift: `messages` and `videos`; the `<video>` may be left out, and then comes first."""

from __future__ import annotations

from storm_vlm.data.schema import Row
from storm_vlm.formats import llama_factory
from storm_vlm.formats.parse import Fields, conversation_rows, one_video, recorded


def convert(item: Fields) -> list[Fields]:
    """One row for each pair of turns, or the row that :func:`export` wrote along."""
    if row := recorded(item, export):
        return [row]
    return conversation_rows(item, item.get("messages"), one_video(item), range(0, 2))


def export(row: Row) -> Fields:
    """The layout is the same as LLaMA-Factory's."""
    return llama_factory.export(row)
