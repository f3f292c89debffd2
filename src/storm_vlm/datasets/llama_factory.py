"""LLaMA-Factory's ShareGPT layout: `messages` or `conversations`, a `<video>` in the text for each of `videos`."""

from __future__ import annotations

from storm_vlm.data.prompt import answer_text, question_text
from storm_vlm.data.row import Row
from storm_vlm.datasets.parse import Fields, conversation_rows, one_video, recorded


def convert(item: Fields) -> list[Fields]:
    """One row for each pair of turns, or the row that :func:`export` wrote along."""
    if row := recorded(item, export):
        return [row]
    turns = item.get("messages") or item.get("conversations")
    return conversation_rows(item, turns, one_video(item), range(1, 2))


def export(row: Row) -> Fields:
    """The question as our prompt asks it, the answer as our training teaches it, and the row in text.

    Raises ``ValueError`` for what the layout cannot say.
    """
    if row.start is not None or row.end is not None:
        raise ValueError("no window in this format: cut the clip from start to end first")
    asked, answer = question_text(row.question, row.options), answer_text(row)
    if any(f"<{kind}>" in text for kind in ("video", "image", "audio") for text in (asked, answer)):
        raise ValueError(f"a placeholder in the text: {row.question!r}")
    return {
        "messages": [
            {"role": "user", "content": f"<video>{asked}"},
            {"role": "assistant", "content": answer},
        ],
        "videos": [row.video],
        "storm": row.model_dump_json(),  # as text: loaders want one type for each column
    }


def dataset_info(file_name: str) -> Fields:
    """The entry that LLaMA-Factory's `dataset_info.json` needs."""
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "videos": "videos"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }
