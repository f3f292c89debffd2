"""What of OpenAI's chat protocol is spoken: requests, answers and errors as it has them.

A field that is not here is refused, not ignored: an answer never differs silently from what was asked for.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from storm_vlm.data.prompt import LatentMode
from storm_vlm.inference.pipeline import Answer

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Fields):
    type: Literal["text"]
    text: str = Field(max_length=16_384)


class VideoUrl(_Fields):
    url: str = Field(description="data:video/mp4;base64,…, http(s)://…, or a file of the server's.")


class VideoPart(_Fields):
    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | VideoPart, Field(discriminator="type")]


class Message(_Fields):
    """A question about at most one video, which the model is shown first, as in training."""

    role: Literal["user"]
    content: Annotated[str, Field(max_length=16_384)] | list[Part]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | VideoPart]:
        text = self.content
        return [TextPart(type="text", text=text)] if isinstance(text, str) else text


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(_Fields):
    type: Literal["text"]


def _one_question(messages: Any) -> Any:
    """Raises ValueError for what the model was never trained on."""
    roles = (
        [m.get("role") for m in messages if isinstance(m, dict)]
        if isinstance(messages, list)
        else []
    )
    if roles and roles != ["user"]:
        raise ValueError(
            f"send one message of the role user, not {len(roles)} ({', '.join(map(str, roles[:8]))}): "
            "each question is answered by itself, without a system message or earlier turns"
        )
    return messages


class ChatRequest(_Fields):
    """`POST /v1/chat/completions`. Answers are greedy unless a temperature is given."""

    model: str
    messages: Annotated[list[Message], BeforeValidator(_one_question)] = Field(
        min_length=1, max_length=1
    )
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    latent_mode: LatentMode | None = Field(
        None, description="force, auto or off; by default what the checkpoint is for."
    )
    # Taken at the one value that means what is done anyway.
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    # Of no meaning to the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


class Refusal(HTTPException):
    """A request that is not answered, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(status, message, names)
        self.code = code


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of an error; what is no Unicode, such as half a surrogate pair, is replaced."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    shown = [text and text.encode(errors="replace").decode() for text in (message, param)]
    return {"error": {"message": shown[0], "type": kind, "param": shown[1], "code": code}}


def error_response(error: HTTPException) -> JSONResponse:
    """Of a refusal, or of what FastAPI refuses itself (404, 405, broken JSON)."""
    body = error_body(error.status_code, str(error.detail), getattr(error, "code", None))
    return JSONResponse(body, error.status_code, error.headers)


class Completion:
    """One answer on its way out, whole or in pieces."""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.model = model

    def whole(self, answer: Answer, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"message": message, "finish_reason": finish_reason}
        return self._body("chat.completion", [choice], usage=usage(answer))

    def piece(self, text: str | None = None, finish_reason: str | None = None) -> dict[str, Any]:
        """Without a text: the first, which says who speaks, or the last, which says why it ended."""
        delta = {} if text is None else {"content": text}
        if text is None and finish_reason is None:
            delta = {"role": "assistant", "content": ""}
        choice = {"delta": delta, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def totals(self, answer: Answer) -> dict[str, Any]:
        return self._body("chat.completion.chunk", [], usage=usage(answer))

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        choices = [{"index": 0, "logprobs": None, **choice} for choice in choices]
        return {**self.head, "object": kind, "model": self.model, "choices": choices, **more}


def usage(answer: Answer) -> dict[str, Any]:
    """Latent slots are what the protocol calls reasoning tokens, and count among those of the completion."""
    written = answer.tokens + answer.slots_used
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": answer.prompt_tokens + written,
        "prompt_tokens_details": {"video_tokens": answer.visual_tokens},
        "completion_tokens_details": {"reasoning_tokens": answer.slots_used},
    }
