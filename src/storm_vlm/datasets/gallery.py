"""A static page to look through rows: question, keyframes, plan, and the thought video beside its source."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm.auto import tqdm

from storm_vlm.data.atomic_write import write_text
from storm_vlm.data.check import tell_faults
from storm_vlm.data.jpeg import jpeg_uri
from storm_vlm.data.json_objects import scan_objects
from storm_vlm.data.output import check_outputs
from storm_vlm.data.prompt import option_letter
from storm_vlm.data.row import Row, scan_rows
from storm_vlm.data.video import VideoError, read_frames, video_shape
from storm_vlm.errors import StormError
from storm_vlm.pages import render

log = logging.getLogger(__name__)
SIDE = 256  # pixels of a keyframe's longer side


def write_gallery(source: Path, out: Path | None = None, limit: int = 100) -> Path:
    """Write the page for a file of rows, or the folder of one, and return its path.

    Keyframes are within the page; videos play from their files, which it names relative to itself. The first
    ``limit`` rows are shown. Raises StormError if a folder has no such file or several, ``RowError`` and
    ``OSError``.
    """
    file = _rows_file(source)
    out = out or file.with_suffix(".html")
    check_outputs([out], [file])
    rows, faults = scan_rows(file)
    tell_faults(faults, len(rows) + len(faults), file)
    rejects = [
        _reject(item)
        for path in (file.parent / "rejects.jsonl", file.with_suffix(".rejects.jsonl"))
        if path.is_file()
        for _, item in scan_objects(path)
    ]
    shown = [_card(row, out) for row in tqdm(rows[:limit], "rows", leave=False)]
    odd = sum(bool(c["clip"]["fault"] or (c["thought"] or {}).get("fault")) for c in shown)
    if odd:
        log.warning(
            "%d of %d rows have a clip that cannot be shown: the page says why", odd, len(shown)
        )
    page = render(
        "gallery.html",
        name=file.name,
        cards=shown,
        total=len(rows),
        rejects=rejects[:limit],
        reasons=Counter(reject["reason"] for reject in rejects).most_common(),
    )
    write_text(out, page)
    return out


def _rows_file(source: Path) -> Path:
    if not source.is_dir():
        return source
    if (source / "rows.jsonl").is_file():
        return source / "rows.jsonl"
    found = sorted(path for path in source.glob("*.jsonl") if "rejects" not in path.name)
    if len(found) != 1:
        named = ", ".join(path.name for path in found) or "none"
        raise StormError(f"{source}: name one file of rows in it; there is {named}")
    return found[0]


def _card(row: Row, page: Path) -> dict[str, Any]:
    thought = row.thought_video
    provenance = dict(thought.provenance) if thought else {}
    prompt, scores = provenance.pop("prompt", None), provenance.pop("filters", None)
    made = {"source": thought.source, "generator": thought.generator} if thought else {}
    return {
        "row": row,
        "options": [(option_letter(i), option) for i, option in enumerate(row.options)],
        "clip": _video(row.video, page, row.start),
        "thought": _video(thought.path, page, thought.start) if thought else None,
        "keyframes": [_keyframe(row.video, time) for time in row.keyframes],
        "prompt": prompt,
        "filters": scores if isinstance(scores, dict) else {},
        "provenance": {key: _plain(value) for key, value in (made | provenance).items()},
        "meta": {key: _plain(value) for key, value in row.meta.items()},
    }


def _keyframe(video: str, time: float) -> dict[str, Any]:
    """The frame on screen at a time, as a data URI, or why there is none."""
    try:
        image = jpeg_uri(read_frames(video, [time], SIDE).frames[0])
    except VideoError as error:
        return {"time": time, "image": None, "error": str(error)}
    return {"time": time, "image": image, "error": None}


def _video(path: str, page: Path, start: float | None = None) -> dict[str, Any]:
    """Where it is, and why it cannot be shown."""
    link, fault = quote(Path(os.path.relpath(path, page.absolute().parent)).as_posix()), ""
    try:
        video_shape(path, start)
    except VideoError as error:
        fault = str(error)
    return {"link": link, "fault": fault}


def _reject(item: Any) -> dict[str, str]:
    """Reason and what is known of a row, whoever rejected it."""
    item = item if isinstance(item, dict) else {"row": item}
    row = item.get(
        "row", {key: value for key, value in item.items() if key not in ("reason", "detail")}
    )
    return {
        "reason": str(item.get("reason", "no reason given")),
        "detail": str(item.get("detail") or ""),
        "row": _plain(row)[:600],
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
