"""The `tools` reasoner: the model may look at parts of the video again (LongVT's protocol), in process.

Every round reads the whole conversation again, frames included, as a server without a prefix cache does.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from storm_vlm.data.prompt import question_text, without_control_tokens
from storm_vlm.data.video import Clip, VideoError
from storm_vlm.errors import StormError
from storm_vlm.inference.chat import ChatModel, Completion, Conversation, Turn
from storm_vlm.inference.frames import Frames, QuestionLike
from storm_vlm.inference.local_chat import chat_model
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import Reasoner
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


class ToolLoop(Reasoner):
    """At most `rounds` calls of `crop_video`, then an answer. What a call asks for wrongly is told to the model.

    Args:
        fps: of the frames that come back.
        max_frames: in one look.
    """

    MAX_NEW_TOKENS: ClassVar[int] = 1024

    def __init__(
        self,
        model: StormPipeline | ChatModel,
        frames: Frames,
        max_new_tokens: int | None = None,
        rounds: int = 5,
        fps: float = 1.0,
        max_frames: int = 128,
    ) -> None:
        super().__init__(frames, max_new_tokens)
        self.chat = chat_model(model)
        self.rounds, self.fps, self.max_frames = rounds, fps, max_frames

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "rounds": self.rounds,
            "fps": self.fps,
            "most_frames": self.max_frames,
            **self.chat.settings,
        }

    def prompt(self, question: QuestionLike) -> str:
        """With the place of the video's length left open."""
        return question_text(question.question, question.options, INSTRUCTION)

    def answer(self, questions: Sequence[QuestionLike]) -> list[Reply]:
        conversations = [
            Conversation(question, self.frames, self._first_prompt) for question in questions
        ]
        going = conversations
        for left in range(self.rounds, -1, -1):
            turns = [conversation.turns for conversation in going]
            completions = self.chat.write(turns, self.max_new_tokens)
            going = [
                conversation
                for conversation, completion in zip(going, completions, strict=True)
                if self._goes_on(conversation, completion, left)
            ]
            if not going:
                break
        return [conversation.reply() for conversation in conversations]

    def _first_prompt(self, question: QuestionLike, clip: Clip | None) -> str:
        if clip is None or not isinstance(question.video, str):
            raise StormError(
                "the tools reasoner looks at the file again, so it needs one: give video files, and no control that "
                "changes frames"
            )
        letter = ", as the option's letter," if question.options else ""
        instruction = INSTRUCTION.format(
            length=_length(clip, question), rounds=self.rounds, letter=letter
        )
        return question_text(question.question, question.options, instruction)

    def _goes_on(self, conversation: Conversation, completion: Completion, left: int) -> bool:
        """Take the model's turn in; carry out its call, if it made one and has rounds left."""
        conversation.add(completion)
        call = _CALL.search(completion.text)
        if call is None or not left:
            return False
        # What it wrote behind its call, it could not know.
        kept = without_control_tokens(completion.text[: call.end()])
        conversation.turns.append(Turn("assistant", kept))
        began = time.perf_counter()
        clip = None
        try:
            clip, response = self._crop(conversation, call[1])
        except (ToolError, VideoError) as error:
            response = f"Error: {error}"
        conversation.spend({"tool": time.perf_counter() - began})
        text = f"<tool_response>{response}</tool_response>" + LAST * (left == 1)
        conversation.turns.append(Turn("user", text, clip, conversation.turns[0].starts_at))
        return True

    def _crop(self, conversation: Conversation, call: str) -> tuple[Clip, str]:
        shown = conversation.turns[0].clip
        assert shown is not None
        offset = conversation.turns[0].starts_at
        start, end = crop_window(call, _length(shown, conversation.question))
        count = min(self.max_frames, max(2, math.ceil((end - start) * self.fps)))
        clip = self.frames.window(shown.path, count, offset + start, offset + end)
        return clip, f"{len(clip.frames)} frames from {start:.2f} to {end:.2f} s"


def crop_window(call: str, length: float) -> tuple[float, float]:
    """Start and end, in seconds, that a call's JSON asks for, cut to a video of `length`.

    Raises:
        ToolError: not a call of `crop_video`, or a window with nothing in it.
    """
    try:
        request = json.loads(call, parse_int=float)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ToolError("the call is not JSON") from error
    if not isinstance(request, dict) or request.get("name") != "crop_video":
        raise ToolError("the only tool is crop_video")
    arguments = request.get("arguments")
    if not isinstance(arguments, dict):
        raise ToolError("crop_video needs arguments: start_time and end_time")
    start, end = (_number(arguments.get(name)) for name in ("start_time", "end_time"))
    if start is None or end is None:
        raise ToolError("start_time and end_time must be numbers, in seconds")
    start, end = max(0.0, start), min(length, end)
    if not start < end:
        raise ToolError(f"start_time must be before end_time, within 0 to {length:.2f} s")
    return start, end


def _length(clip: Clip, question: QuestionLike) -> float:
    """Seconds from the window's start to the last frame shown."""
    return float(clip.timestamps[-1]) - (question.start or 0.0)


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) and not math.isnan(value) else None
