"""Video-R1: the 260k questions and the 165k with chains of thought (paper section 4.2), video rows only."""

from __future__ import annotations

from pathlib import PurePosixPath

from storm_vlm.datasets.parse import Fields, Skipped, choice, text_of, unwrapped


def video_r1_rows(item: Fields) -> list[Fields]:
    """One row; a chain of thought (`process`) is its plan."""
    kind = item.get("data_type")
    if kind != "video":
        raise Skipped(f"{kind or 'unknown type of'} row")
    path = text_of(item, "path").removeprefix("./")
    problem_type = item.get("problem_type")
    options = item.get("options") or []
    if problem_type == "multiple choice" and not options:
        raise ValueError("multiple choice without options")
    solution = text_of(item, "solution")
    process = item.get("process") or ""
    meta = {
        "source": item.get("data_source") or PurePosixPath(path).parts[0],
        "problem_type": problem_type,
        "original": {"options": options, "solution": solution},
    }
    fields = choice(text_of(item, "problem"), options, solution)
    plan = unwrapped(process, "think") or None
    row = fields | {"video": path, "plan": plan, "meta": meta}
    if item.get("problem_id") is not None:
        row["id"] = f"video-r1-{item['problem_id']}"
    return [row]
