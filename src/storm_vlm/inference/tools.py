"""The `tools` reasoner: the model may look at parts of the video again (LongVT's protocol), in process.

Every round reads the whole conversation again, frames included, as a server without a prefix cache does.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storm_vlm.data.prompt import question_text, without_control_tokens
from storm_vlm.data.video import Clip, VideoError
from storm_vlm.errors import StormError
from storm_vlm.inference.frames import Asked, Frames
from storm_vlm.inference.local_chat import ChatModel, Turn, Written
from storm_vlm.inference.reasoners import MAX_NEW_TOKENS, Talk, added
from storm_vlm.inference.reply import Reply

INSTRUCTION = (
    "The video lasts {length:.1f} seconds. Think between <think> and </think>. To look at a part of it more closely, "
    'write <tool_call>{{"name": "crop_video", "arguments": {{"start_time": 0.0, "end_time": {length:.1f}}}}}'
    "</tool_call> with its start and end in seconds, and stop: its frames come back. You can do so {rounds} times. "
    "When you are sure, give only the answer{letter} between <answer> and </answer>."
)
LAST = " That was the last look: now give the answer between <answer> and </answer>."
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class ToolError(StormError, ValueError):
    """A call that cannot be carried out; the message is what the model is told."""


@dataclass(frozen=True)
class Tools:
    """At most `rounds` calls of `crop_video`, then an answer. What a call asks for wrongly is told to the model."""

    chat: ChatModel
    frames: Frames
    max_new_tokens: int = MAX_NEW_TOKENS["tools"]
    rounds: int = 5
    fps: float = 1.0  #: of the frames that come back
    most_frames: int = 128  #: in one look

    @property
    def settings(self) -> dict[str, Any]:
        names = ("max_new_tokens", "rounds", "fps", "most_frames")
        return {**{name: getattr(self, name) for name in names}, **self.chat.settings}

    def prompt(self, asked: Asked) -> str:
        """With the place of the video's length left open."""
        return question_text(asked.question, asked.options, INSTRUCTION)

    def answer(self, rows: Sequence[Asked]) -> list[Reply]:
        talks = [Talk(row, "", self.frames) for row in rows]
        for talk in talks:
            first = talk.turns[0]
            talk.turns[0] = Turn(
                "user", self._prompt(talk.asked, first.clip), first.clip, first.starts_at
            )
        going = talks
        for left in range(self.rounds, -1, -1):
            written = self.chat.write([talk.turns for talk in going], self.max_new_tokens)
            going = [
                talk
                for talk, turn in zip(going, written, strict=True)
                if self._go_on(talk, turn, left)
            ]
            if not going:
                break
        return [talk.reply() for talk in talks]

    def _prompt(self, asked: Asked, clip: Clip | None) -> str:
        if clip is None or not isinstance(asked.video, str):
            raise ValueError(
                "the tools reasoner looks at the file again, so it needs one: give video files, and no control that "
                "changes frames"
            )
        length = float(clip.timestamps[-1]) - (asked.start or 0.0)
        letter = ", as the option's letter," if asked.options else ""
        return question_text(
            asked.question,
            asked.options,
            INSTRUCTION.format(length=length, rounds=self.rounds, letter=letter),
        )

    def _go_on(self, talk: Talk, written: Written, left: int) -> bool:
        """Take the model's turn in; carry out its call, if it made one and has rounds left."""
        talk.hear(written)
        call = _CALL.search(written.text)
        if call is None or not left:
            return False
        # What it wrote behind its call, it could not know.
        kept = without_control_tokens(written.text[: call.end()])
        talk.turns.append(Turn("assistant", kept))
        began = time.perf_counter()
        clip = None
        try:
            clip, said = self._crop(talk, call[1])
        except (ToolError, VideoError) as error:
            said = f"Error: {error}"
        talk.seconds = added(talk.seconds, {"tool": time.perf_counter() - began})
        text = f"<tool_response>{said}</tool_response>" + LAST * (left == 1)
        talk.turns.append(Turn("user", text, clip, talk.turns[0].starts_at))
        return True

    def _crop(self, talk: Talk, call: str) -> tuple[Clip, str]:
        shown = talk.turns[0].clip
        assert shown is not None
        offset = talk.asked.start or 0.0
        length = float(shown.timestamps[-1]) - offset
        start, end = crop_window(call, length)
        count = min(self.most_frames, max(2, math.ceil((end - start) * self.fps)))
        clip = self.frames.window(shown.path, count, offset + start, offset + end)
        return clip, f"{len(clip.frames)} frames from {start:.2f} to {end:.2f} s"


def crop_window(call: str, length: float) -> tuple[float, float]:
    """Start and end, in seconds, that a call's JSON asks for, cut to a video of `length`.

    Raises:
        ToolError: not a call of `crop_video`, or a window with nothing in it.
    """
    try:
        asked = json.loads(call, parse_int=float)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ToolError("the call is not JSON") from error
    if not isinstance(asked, dict) or asked.get("name") != "crop_video":
        raise ToolError("the only tool is crop_video")
    arguments = asked.get("arguments")
    if not isinstance(arguments, dict):
        raise ToolError("crop_video needs arguments: start_time and end_time")
    start, end = (_number(arguments.get(name)) for name in ("start_time", "end_time"))
    if start is None or end is None:
        raise ToolError("start_time and end_time must be numbers, in seconds")
    start, end = max(0.0, start), min(length, end)
    if not start < end:
        raise ToolError(f"start_time must be before end_time, within 0 to {length:.2f} s")
    return start, end


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) and not math.isnan(value) else None
