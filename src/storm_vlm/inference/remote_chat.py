"""A model behind an OpenAI-compatible endpoint: GPT-4o, Gemini, or an open model that vLLM serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from storm_vlm.data.jpeg import jpeg_uri
from storm_vlm.data.store import key_of
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.errors import StormError
from storm_vlm.inference.chat import Completion, Turn
from storm_vlm.inference.client import (
    Endpoint,
    EndpointError,
    RefusedError,
    UnansweredError,
)

SILENT = 3  # requests without an answer, one after another: the server is down, not these rows odd


class RemoteChat:
    """Frames go as JPEG images, each after a line with its time; a batch is asked in parallel.

    The key is taken from `OPENAI_API_KEY`. `seconds` are each request's own, so those of requests that
    ran side by side overlap. Needs the `api` extra.

    Args:
        url: e.g. `http://localhost:8000/v1`.
        model: the name by which the endpoint knows it.
        max_side: of a frame, in pixels; larger ones are scaled down.
        retries: of a request that met a full or failing server.
        timeout: of a request, in seconds.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_side: int = 512,
        retries: int = 5,
        timeout: float = 600.0,
    ) -> None:
        self.url, self.model, self.max_side = url, model, max_side
        self._endpoint = Endpoint(url, "OPENAI_API_KEY", retries, timeout)
        self._paid: dict[str, Completion] = {}  # of a batch that another of its requests undid

    @property
    def settings(self) -> dict[str, Any]:
        return {"endpoint": self.url, "max_side": self.max_side}

    def write(self, chats: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[Completion]:
        bodies: list[dict[str, Any]] = [
            {
                "model": self.model,
                "messages": [self._message(turn) for turn in chat],
                "max_tokens": max_new_tokens,
                "temperature": 0,
            }
            for chat in chats
        ]
        keys = [key_of(**body) for body in bodies]
        with thread_pool(len(chats)) as pool:
            outcomes = list(pool.map(self._ask, keys, bodies))
        errors = [outcome for outcome in outcomes if isinstance(outcome, StormError)]
        if not errors:
            return [outcome for outcome in outcomes if isinstance(outcome, Completion)]
        self._paid |= {
            key: outcome
            for key, outcome in zip(keys, outcomes, strict=True)
            if isinstance(outcome, Completion)
        }
        raise min(errors, key=lambda error: isinstance(error, (RefusedError, UnansweredError)))

    def _ask(self, key: str, body: dict[str, Any]) -> Completion | StormError:
        if (paid := self._paid.pop(key, None)) is not None:
            return paid
        began = time.perf_counter()
        try:
            _, response = self._endpoint.complete(body)
        except UnansweredError as error:
            if self._endpoint.silence < SILENT:
                return error
            return EndpointError(f"{error}; check address, key and model, then run again")
        except StormError as error:
            return error
        seconds = {"answer": time.perf_counter() - began}
        counts = (response.tokens, response.prompt_tokens, 0)
        return Completion(response.text.strip(), *counts, seconds, response.fault)

    def _message(self, turn: Turn) -> dict[str, Any]:
        if turn.clip is None:
            return {"role": turn.role, "content": turn.text}
        parts: list[dict[str, Any]] = []
        for time_, frame in zip(turn.clip.timestamps, turn.clip.frames, strict=True):
            url = jpeg_uri(frame, self.max_side)
            parts.append({"type": "text", "text": f"{time_ - turn.starts_at:.2f} s"})
            parts.append({"type": "image_url", "image_url": {"url": url}})
        return {"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]}
