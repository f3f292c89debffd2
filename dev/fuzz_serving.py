"""Schemathesis's hooks for `make fuzz`: most requests name the model; half of the videos are a real one, damaged."""

import base64
import random
from pathlib import Path

import schemathesis

CLIP = next(Path("runs/fuzz/clips").glob("*.mp4")).read_bytes()
DRAW = random.Random(0)


@schemathesis.hook
def map_body(context, body):
    """What FastAPI's schema cannot say: the model's name, and what a video's bytes look like."""
    if not isinstance(body, dict):
        return body
    if DRAW.random() < 0.9:
        body["model"] = "storm"
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            video = part.get("video_url") if isinstance(part, dict) else None
            if isinstance(video, dict) and DRAW.random() < 0.5:
                video["url"] = "data:video/mp4;base64," + base64.b64encode(_damaged()).decode()
    return body


def _damaged() -> bytes:
    clip = bytearray(CLIP)
    for _ in range(DRAW.choice((0, 1, 8, 64))):
        clip[DRAW.randrange(len(clip))] = DRAW.randrange(256)
    return bytes(clip[: DRAW.choice((len(clip), len(clip), DRAW.randrange(len(clip))))])
