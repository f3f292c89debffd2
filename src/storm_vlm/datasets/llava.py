"""LLaVA-Video-178K: `conversations` that write `<image>` for a video."""

from __future__ import annotations

from storm_vlm.datasets.parse import Fields, conversation_rows, one_video


def convert(item: Fields) -> list[Fields]:
    """One row for each pair of turns. `id` is the video's, so several objects have the same."""
    rows = conversation_rows(item, item.get("conversations"), one_video(item), range(1, 2))
    for row in rows:
        row["meta"]["source"] = item.get("data_source") or "LLaVA-Video-178K"
    return rows
