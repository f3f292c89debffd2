"""The client of an OpenAI-compatible endpoint: the teacher's, and that of models to be evaluated."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from storm_vlm.data.thread_pool import proceed
from storm_vlm.errors import AccessError, InputError, StormError

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

log = logging.getLogger(__name__)
Fault = Literal["", "cut_off", "filtered", "empty"]

SHOWN = 300  # characters of what a server or a model wrote, in a message
#: Settings that some models do not take, and what they take instead. A 400 that names one decides, once.
DISPENSABLE = {"max_tokens": "max_completion_tokens", "temperature": "", "response_format": ""}
_UNSUPPORTED = re.compile(r"support|unknown|unrecognized|not permitted|not allowed", re.IGNORECASE)
_UNPAID = re.compile(r"insufficient.?(?:quota|balance|credit|fund)|billing|arrear", re.IGNORECASE)
_MODERATION = re.compile(r"moderat|content|safety|policy|flagged|inspection", re.IGNORECASE)


class EndpointError(AccessError):
    """An endpoint that cannot be worked with: a wrong address, key or model, or a server that is down."""


class UnansweredError(EndpointError):
    """No answer to this request, retries and all."""


class RefusedError(InputError):
    """The endpoint would not take this request (moderation, too long, an odd picture), though it takes others."""


@dataclass(frozen=True)
class Response:
    """What of a chat completion matters."""

    text: str  #: of the message; "" where there is none
    thoughts: str  #: what a reasoning model wrote beside it (`reasoning_content`)
    fault: Fault  #: what may keep the text from being an answer
    tokens: int  #: written; 0 where the endpoint does not tell
    prompt_tokens: int


def read_completion(raw: bytes) -> Response | None:
    """A chat completion, or None for a body that was cut off or is something else."""
    try:
        completion = json.loads(raw)
        choice = completion["choices"][0]
        message, usage = choice["message"], completion.get("usage") or {}
        text = _text(message.get("content"))
        thoughts = _text(message.get("reasoning_content") or message.get("reasoning"))
        reason = choice.get("finish_reason")
        counts = (usage.get("completion_tokens") or 0, usage.get("prompt_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    fault: Fault = "" if text.strip() else "empty"
    if reason == "length":
        fault = "cut_off"
    if reason == "content_filter" or message.get("refusal"):
        fault = "filtered"
    return Response(text, thoughts, fault, *counts)


def _text(content: Any) -> str:
    """Of a message's content: text, a list of parts, or nothing."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _told(error: APIStatusError) -> str:
    """What the server says, its code first."""
    return f"{error.code}: {error}" if error.code else str(error)


def _is_unpaid(error: APIStatusError) -> bool:
    """By the code alone: what a rate limit says often mentions quota and billing, too."""
    return bool(_UNPAID.search(f"{error.code} {error.type}"))


class Endpoint:
    """Sends requests until one is answered. Safe to use from many threads.

    Args:
        url: None: OpenAI's own.
        key_env: the environment variable of the key.
        retries: of 429, 5xx, timeouts, broken connections, and of answers that are no chat completion.
        timeout: of a request, in seconds.
    """

    def __init__(self, url: str | None, key_env: str, retries: int, timeout: float) -> None:
        parts = urlsplit(url or "https://api.openai.com")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"{url!r} is no address of a server: it is like http://localhost:8000/v1"
            )
        self.name = url or "OpenAI's endpoint"
        self.silence: float = float(
            "inf"
        )  #: requests without an answer since the last that had one
        self._url, self._key_env, self._retries, self._timeout = url, key_env, retries, timeout
        self._replaced: dict[str, str] = {}  # of `DISPENSABLE`, what this model does not take

    def complete(self, body: dict[str, Any], **headers: str) -> tuple[bytes, Response]:
        """The answer to one request as it came, and read.

        Raises:
            RefusedError, UnansweredError: for this request.
            EndpointError: it will not take any.
            StormError: the package is missing, or the key where it is needed.
        """
        raw = b""
        for attempt in range(self._retries + 1):
            raw = self._send(body, headers)
            if (response := read_completion(raw)) is not None:
                self.silence = 0
                return raw, response
            if raw.lstrip().startswith(b"<") and self.silence == float("inf"):
                raise EndpointError(f"{self.name} answers with a web page: an address ends in /v1")
            if attempt < self._retries:
                time.sleep(min(0.25 * 2**attempt, 8))
        self.silence += 1
        shown = raw[:SHOWN].decode(errors="replace")
        raise UnansweredError(f"{self.name} answers with what is no chat completion: {shown!r}")

    def _send(self, body: dict[str, Any], headers: dict[str, str]) -> bytes:
        """The bytes of an answer; backoff and Retry-After are the package's own."""
        import openai

        while True:
            sent = {self._replaced.get(name, name): value for name, value in body.items()}
            sent.pop("", None)
            try:
                create = self._client.chat.completions.with_raw_response.create
                return create(**sent, extra_headers=headers).content
            except (
                openai.APIConnectionError,
                openai.RateLimitError,
                openai.InternalServerError,
            ) as error:
                self.silence += 1
                if isinstance(error, openai.RateLimitError) and _is_unpaid(error):
                    raise self._verdict(error) from error
                raise UnansweredError(f"{self.name}: {type(error).__name__}: {error}") from error
            except openai.APIStatusError as error:
                if not self._does_without(sent, error):
                    raise self._verdict(error) from error

    def _does_without(self, sent: dict[str, Any], error: APIStatusError) -> bool:
        """Whether the refusal is of a setting that can be left out or has another name; it is remembered."""
        told = _told(error)
        if error.status_code != 400 or not _UNSUPPORTED.search(told):
            return False
        for name, other in DISPENSABLE.items():
            if name in sent and name in told and other in told:
                self._replaced[name] = other
                log.warning("%s does not take %s: %s", self.name, name, other or "left out")
                return True
        return False

    def _verdict(self, error: APIStatusError) -> StormError:
        status, told = error.status_code, _told(error)
        if _is_unpaid(error):
            return EndpointError(
                f"{self.name} wants money, waiting does not help: {told[:SHOWN]}; mend the account, then run again"
            )
        self.silence = 0 if status not in (401, 402, 403, 404, 405) else self.silence
        if status in (401, 402, 404, 405) or (status == 403 and not _MODERATION.search(told)):
            return EndpointError(
                f"{self.name} refuses the request: {told[:SHOWN]}; check address, key and model"
            )
        return RefusedError(f"{self.name} refused this request: {told[:SHOWN]}")

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError as error:
            raise StormError(
                "an endpoint needs the openai client: pip install 'storm-vlm[api]'"
            ) from error
        key = os.environ.get(self._key_env)
        if not key and not self._url:
            raise StormError(f"no API key: set {self._key_env}, or name a base_url")
        # Own servers mostly want no key.
        return OpenAI(
            api_key=key or "none",
            base_url=self._url,
            max_retries=self._retries,
            timeout=self._timeout,
            http_client=DefaultHttpxClient(event_hooks={"request": [lambda _: proceed()]}),
        )
