"""Chat messages in OpenAI's style: content is text or a list of typed parts, one of them a video."""

from __future__ import annotations

from typing import Any

from storm_vlm.datasets.parse import Fields, conversation_rows, one_video


def convert(item: Fields) -> list[Fields]:
    """One row for each pair of turns. Parts: `text`, `video` (a path) and `video_url` ({"url": ...})."""
    media: Fields = {"videos": [], "images": []}
    turns: list[Any] = []
    for message in item.get("messages") or []:
        content = message.get("content")
        texts = [_text(part, media) for part in content] if isinstance(content, list) else [content]
        turns.append(message | {"content": "".join(text for text in texts if text)})
    return conversation_rows(item, turns, one_video(media), range(0, 1))


def _text(part: Fields, media: Fields) -> str:
    kind = part.get("type")
    if kind == "text":
        return part["text"]
    if kind not in ("video", "video_url", "image", "image_url"):
        raise ValueError(f"part of unknown type: {kind!r}")
    value = part.get(kind)
    url = value.get("url") if isinstance(value, dict) else value
    name = url.removeprefix("file://") if isinstance(url, str) else url
    media["videos" if kind.startswith("video") else "images"].append(name)
    return ""
