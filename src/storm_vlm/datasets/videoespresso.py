"""VideoEspresso: open questions of its training set, multiple choice of its test set; core frames as keyframes."""

from __future__ import annotations

from pathlib import Path

from storm_vlm.datasets.parse import Fields, choice, text_of

LOOKED_AT = 128  # frames of a video among which its core frames are found
ALIKE = 0.35  # of `distances`: an encoder and half a step in time leave less, another shot more


def videoespresso_rows(item: Fields) -> list[Fields]:
    """One row. The evidence is kept in `meta` and never asked with; so are the core frames' file names."""
    options = item.get("options") or []
    answer = text_of(item, "correct_answer" if options else "answer")
    meta: Fields = {
        "source": "VideoEspresso",
        "task": item.get("task"),
        "evidence": item.get("evidence"),
        "core_frames": item.get("core_frames_paths") or [],
        "original": {"options": options, "answer": answer},
    }
    fields = choice(text_of(item, "question"), options, answer)
    return [fields | {"video": text_of(item, "video_path"), "meta": meta}]


def find_core_frames(video: str, images: list[Path]) -> list[float]:
    """When a video shows each image, in seconds, ascending: the most alike of 128 frames spread over it.

    The files' names do not say it. Raises ``ValueError`` for an image that is missing or that the video does not
    show, and ``VideoError``.
    """
    from storm_vlm.data.frame_hash import distances, frame_hashes, image_hash
    from storm_vlm.data.video import read_video

    clip = read_video(video, LOOKED_AT, max_side=256)
    shown = frame_hashes(clip.frames)
    times: set[float] = set()
    for image in images:
        if not image.is_file():
            raise ValueError(f"core frame missing: {image}")
        apart = distances(image_hash(image), shown)[0]
        if apart.min() > ALIKE:
            raise ValueError(f"core frame is not in the video: {image}, {video}")
        times.add(float(clip.timestamps[apart.argmin()]))
    return sorted(times)
