"""Conversations about a video: LLaVA-Video-178K, LLaMA-Factory's ShareGPT layout, ms-swift and OpenAI's messages.

Each importer makes one row for each pair of turns. The export is in the ShareGPT layout.
"""

from __future__ import annotations

import re
from typing import Any

from storm_vlm.data.prompt import answer_text, question_text
from storm_vlm.data.row import Row
from storm_vlm.datasets.parse import Fields, Skipped, listed_choice, unwrapped

_PLACEHOLDER = re.compile(r"<(?:video|image)>")
_IN_REPLY = re.compile(r"<(?:video|image|rimage|audio)>")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    "system": "system",
}


def llava_rows(item: Fields) -> list[Fields]:
    """`conversations` that write `<image>` for a video. `id` is the video's, so several objects have the same."""
    rows = conversation_rows(item, item.get("conversations"), one_video(item), range(1, 2))
    for row in rows:
        row["meta"]["source"] = item.get("data_source") or "LLaVA-Video-178K"
    return rows


def llama_factory_rows(item: Fields) -> list[Fields]:
    """`messages` or `conversations`, a `<video>` in the text for each of `videos`; or our own record beside them."""
    if row := _recorded(item):
        return [row]
    return conversation_rows(item, _turns(item), one_video(item), range(1, 2))


def swift_rows(item: Fields) -> list[Fields]:
    """As LLaMA-Factory has them; a `<video>` that is left out comes first."""
    if row := _recorded(item):
        return [row]
    return conversation_rows(item, _turns(item), one_video(item), range(0, 2))


def openai_rows(item: Fields) -> list[Fields]:
    """Content is text or parts: `text`; `video` (as `video`, `path` or `url`) and `video_url` ({"url": ...})."""
    media: Fields = {"videos": [], "images": [], "audios": []}
    turns: list[Any] = []
    for message in item.get("messages") or []:
        content = message.get("content")
        texts = [_text(part, media) for part in content] if isinstance(content, list) else [content]
        turns.append(message | {"content": "".join(text for text in texts if text)})
    return conversation_rows(item, turns, one_video(media), range(0, 1))


def sharegpt_item(row: Row) -> Fields:
    """The question as our prompt asks it, the answer as our training teaches it, and the row in text.

    Raises ``ValueError`` for what the layout cannot say.
    """
    if row.start is not None or row.end is not None:
        raise ValueError("no window in this format: cut the clip from start to end first")
    question, answer = question_text(row.question, row.options), answer_text(row)
    if any(
        f"<{kind}>" in text for kind in ("video", "image", "audio") for text in (question, answer)
    ):
        raise ValueError(f"a placeholder in the text: {row.question!r}")
    return {
        "messages": [
            {"role": "user", "content": f"<video>{question}"},
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


def conversation_rows(item: Fields, turns: Any, video: str, placeholders: range) -> list[Fields]:
    """One row for each question and reply about one video.

    A later question is asked without the turns before it; `meta.turn` tells which those are. ``placeholders``: how
    many `<video>` (or `<image>`, as LLaVA writes for a video) the conversation may hold. A reply's <think> is the
    plan. Raises ``ValueError``, also for pictures in a reply: they are what the answer should foresee.
    """
    spoken = [_turn(turn) for turn in turns if turn] if isinstance(turns, list) else []
    system = [text for role, text in spoken if role == "system"] or [item.get("system") or ""]
    spoken = [(role, text) for role, text in spoken if role != "system"]
    if not spoken or [role for role, _ in spoken] != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(f"turns are not question and reply: {[role for role, _ in spoken]}")
    replies = " ".join(text for role, text in spoken if role == "assistant")
    if shown := _IN_REPLY.search(replies):
        raise ValueError(
            f"pictures in a reply: {shown[0]}, as TwiFF and Future-L1 have them, is another format"
        )
    count = sum(len(_PLACEHOLDER.findall(text)) for role, text in spoken if role == "user")
    if count not in placeholders:
        raise ValueError(f"placeholders do not match the videos: {count} for 1 video")
    rows: list[Fields] = []
    for number, ((_, question), (_, reply)) in enumerate(
        zip(spoken[::2], spoken[1::2], strict=True)
    ):
        thought = unwrapped(reply, "think") if "<think>" in reply else None
        stated = reply if "<answer>" in reply else re.split("</think>", reply)[-1]
        fields = listed_choice(_PLACEHOLDER.sub("", question), stated)
        meta: Fields = {"original": {"question": question, "answer": reply}}
        if any(system):
            meta["system"] = "\n".join(system)
        if len(spoken) > 2:
            meta |= {"turn": number, "turns": len(spoken) // 2}
        suffix = f"/{number}" if number else ""
        row = fields | {"video": video, "plan": thought or None, "meta": meta}
        rows.append(row | ({"id": f"{item['id']}{suffix}"} if item.get("id") else {}))
    return rows


def one_video(item: Fields) -> str:
    """The video of an object with `videos` or `video`. Raises :class:`Skipped` unless that is one file, alone."""
    if item.get("audios") or item.get("audio"):
        raise Skipped("audio row")
    videos = item.get("videos") or item.get("video") or []
    videos = videos if isinstance(videos, list) else [videos]
    if not videos:
        raise Skipped("image row" if item.get("images") or item.get("image") else "text row")
    if len(videos) > 1 or item.get("images"):
        raise Skipped("several videos or images")
    if not isinstance(videos[0], str):
        raise Skipped("video given as frames")
    return videos[0]


def _recorded(item: Fields) -> Fields | None:
    """The row that our own exporter wrote along, if it still says what the rest of the object says."""
    if "storm" not in item:
        return None
    row = Row.model_validate_json(item["storm"])
    if any(item.get(key) != value for key, value in sharegpt_item(row).items()):
        raise ValueError("edited beside its `storm` record: delete the record, or edit both")
    return row.model_dump()


def _turns(item: Fields) -> Any:
    """Of the layouts that ms-swift documents, of which LLaMA-Factory has two: messages, ShareGPT, alpaca and query.

    Pairs of a query's `history` come first; alpaca's `input` is a second line of the instruction.
    """
    if turns := item.get("messages") or item.get("conversations"):
        return turns
    pairs = [(pair["human"], pair["assistant"]) for pair in item.get("conversation") or ()]
    if "response" in item:
        pairs = [*(item.get("history") or ()), (item["query"], item["response"])]
    elif "output" in item:
        asked = "\n".join(part for part in (item["instruction"], item.get("input")) if part)
        pairs = [*(item.get("history") or ()), (asked, item["output"])]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _turn(turn: Any) -> tuple[str, str]:
    role = turn.get("role") or turn.get("from")
    text = turn.get("content", turn.get("value"))
    if role not in _ROLES or not isinstance(text, str):
        raise ValueError(f"turn by {role!r} or without text: {str(turn)[:200]}")
    return _ROLES[role], text


def _text(part: Fields, media: Fields) -> str:
    """A part's text; other parts go to `media`."""
    kind = part.get("type")
    if kind == "text":
        return part["text"]
    media_of_kind = f"{str(kind).removeprefix('input_').removesuffix('_url')}s"
    if media_of_kind not in media:
        raise ValueError(f"part of unknown type: {kind!r}")
    value = part.get(str(kind)) or part.get("path") or part.get("url")
    media[media_of_kind].append(value.get("url") if isinstance(value, dict) else value)
    return ""
