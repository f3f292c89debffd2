"""A model behind an OpenAI-compatible endpoint: GPT-4o, Gemini, or an open model that vLLM serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from storm_vlm.data.jpeg import jpeg_uri
from storm_vlm.errors import AccessError
from storm_vlm.inference.chat import Completion, RefusedError, Turn
from storm_vlm.inference.client import connect


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
        self._client = connect(url, "OPENAI_API_KEY", retries, timeout)

    @property
    def settings(self) -> dict[str, Any]:
        return {"endpoint": self.url, "max_side": self.max_side}

    def write(self, chats: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[Completion]:
        with ThreadPoolExecutor(len(chats)) as pool:
            return list(pool.map(lambda chat: self._ask(chat, max_new_tokens), chats))

    def _ask(self, chat: Sequence[Turn], max_new_tokens: int) -> Completion:
        import openai

        messages: Any = [self._message(turn) for turn in chat]
        began = time.perf_counter()
        try:
            response = self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                max_tokens=max_new_tokens,
                temperature=0,
            )
        except openai.BadRequestError as error:
            raise RefusedError(f"{self.url} refused the question: {error}") from error
        except openai.OpenAIError as error:
            raise AccessError(
                f"{self.url}: {error}; check address, key and model, then run again"
            ) from error
        text, usage = response.choices[0].message.content or "", response.usage
        spent = {"answer": time.perf_counter() - began}
        counts = (usage.completion_tokens, usage.prompt_tokens) if usage else (0, 0)
        return Completion(text.strip(), *counts, 0, spent)

    def _message(self, turn: Turn) -> dict[str, Any]:
        if turn.clip is None:
            return {"role": turn.role, "content": turn.text}
        parts: list[dict[str, Any]] = []
        for time_, frame in zip(turn.clip.timestamps, turn.clip.frames, strict=True):
            url = jpeg_uri(frame, self.max_side)
            parts.append({"type": "text", "text": f"{time_ - turn.starts_at:.2f} s"})
            parts.append({"type": "image_url", "image_url": {"url": url}})
        return {"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]}
