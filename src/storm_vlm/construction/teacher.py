"""The teacher: any OpenAI-compatible endpoint, asked once for each thing, whatever happens in between.

An HTTP response is stored, and synced to disk, before anything else is done with it, under the hash of the
request. A later run that comes to the same request, be it a repair in the middle of a conversation, reads it from
there. So the only calls ever paid twice are those that a kill, a broken connection or a timeout catches between
the server's work and the `os.replace` of its response here. The key is sent along as `Idempotency-Key`, by which a
server may close even that gap.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from storm_vlm.construction.config import TeacherConfig
from storm_vlm.construction.prompts import Messages, repair_message
from storm_vlm.data.store import Ledger, Store, key_of, read_json
from storm_vlm.errors import StormError
from storm_vlm.inference.client import connect

if TYPE_CHECKING:
    from openai import OpenAI

Answer = TypeVar("Answer", bound=BaseModel)


class Unanswered(Exception):
    """The endpoint did not answer, retries and all: the row stays unfinished, for the next run."""


class _Filtered(Exception):
    """The endpoint's content filter turned the request down."""


class BudgetReached(Exception):
    """`max_cost` is spent. Calls that were under way still count: it is passed by `workers` calls at most."""


@dataclass(frozen=True)
class TeacherReply(Generic[Answer]):
    """What the teacher answers.

    ``status``: `ok`, `repaired`, `refused` or `invalid`; ``value`` is None for the last two. ``keys`` names the
    responses in the store, one for each turn.
    """

    value: Answer | None
    status: str
    keys: tuple[str, ...]

    def provenance(self, config: TeacherConfig) -> dict[str, Any]:
        return {"status": self.status, "teacher": config.model, "responses": list(self.keys)}


class Spent:
    """Calls and tokens of all responses in the store, whoever asked for them: threads, shards, earlier runs.

    The store is looked through once; then processes tell each other in `usage.log` what they have added.
    """

    def __init__(self, store: Store) -> None:
        self._lock = threading.Lock()
        self._ledger = Ledger(store.folder / "usage.log")
        self._keys: set[str] = set()
        self._prompt = self._completion = 0
        told = self._ledger.news()
        for path in store.files("teacher"):
            usage = told.get(path.stem) or _usage(store.read("teacher", path.stem, read_json))
            self._add(path.stem, usage)

    def note(self, key: str, response: dict[str, Any]) -> None:
        """A response that is now in the store."""
        self._ledger.add(key, _usage(response))

    def totals(self, config: TeacherConfig) -> dict[str, float]:
        """With the responses that have come since the last time."""
        with self._lock:
            for key, usage in self._ledger.news().items():
                self._add(key, usage)
            cost = (self._prompt * config.price_in + self._completion * config.price_out) / 1e6
            return {
                "calls": len(self._keys),
                "prompt_tokens": self._prompt,
                "completion_tokens": self._completion,
                "cost": round(cost, 6),
            }

    def _add(self, key: str, usage: str) -> None:
        if key not in self._keys:
            self._keys.add(key)
            prompt, completion = map(int, usage.split())
            self._prompt += prompt
            self._completion += completion


def _usage(response: dict[str, Any] | None) -> str:
    """Tokens of prompt and completion, as `usage.log` has them."""
    usage = (response or {}).get("usage") or {}
    return f"{usage.get('prompt_tokens') or 0} {usage.get('completion_tokens') or 0}"


class TeacherClient:
    """Safe to use from many threads."""

    def __init__(self, config: TeacherConfig, store: Store) -> None:
        self.config = config
        self.store = store
        self._lock = threading.Lock()
        self._client: OpenAI | None = None
        self.spent = Spent(store)

    def ask(self, messages: Messages, kind: type[Answer], **context: Any) -> TeacherReply[Answer]:
        """An answer that is valid as `kind`, after `repairs` at most.

        Raises:
            Unanswered: no response to be had.
            BudgetReached: before a call, never between a call and its storing.
            StormError: the endpoint refuses requests (a wrong key, model or option): nothing will work.
        """
        keys: list[str] = []
        for turn in range(self.config.repairs + 1):
            try:
                key, response = self._respond(messages, kind)
            except _Filtered:
                return TeacherReply(None, "refused", tuple(keys))
            keys.append(key)
            message = response["choices"][0]["message"]
            text = message.get("content") or ""
            if message.get("refusal"):
                return TeacherReply(None, "refused", tuple(keys))
            try:
                value = kind.model_validate_json(_json_part(text), context=context)
            except ValidationError as error:
                fault = "; ".join(fault["msg"] for fault in error.errors())
                said = {"role": "assistant", "content": text}
                messages = [*messages, said, repair_message(fault)]
            else:
                return TeacherReply(value, "repaired" if turn else "ok", tuple(keys))
        return TeacherReply(None, "invalid", tuple(keys))

    def _respond(self, messages: Messages, kind: type[BaseModel]) -> tuple[str, dict[str, Any]]:
        """The key and the JSON of a chat completion, from the store if it is there."""
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if self.config.response_format == "json_schema":
            schema = kind.model_json_schema()
            schema = {"name": schema["title"], "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.config.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        key = key_of(**body)
        stored = self.store.read("teacher", key, read_json)
        if stored is not None:
            return key, stored
        for _ in range(self.config.retries + 1):
            raw = self._call(body, key)
            response = _completion(raw)
            if response is not None:
                self.store.write("teacher", key, raw)
                self.spent.note(key, response)
                return key, response
        raise Unanswered(f"{self.config.model} answers with what is no chat completion")

    def _call(self, body: dict[str, Any], key: str) -> bytes:
        """One answered request. Retries, backoff and Retry-After are the client's."""
        limit = self.config.max_cost
        if limit is not None and self.spent.totals(self.config)["cost"] >= limit:
            raise BudgetReached
        with self._lock:
            self._client = self._client or connect(
                self.config.base_url,
                self.config.api_key_env,
                self.config.retries,
                self.config.timeout,
            )
        import openai

        try:
            response = self._client.chat.completions.with_raw_response.create(
                **body, extra_headers={"Idempotency-Key": key}
            )
            return response.content
        except (
            openai.APIConnectionError,
            openai.RateLimitError,
            openai.InternalServerError,
        ) as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from error
        except openai.APIStatusError as error:
            if "content" in str(error.code or ""):  # content_filter, content_policy_violation
                raise _Filtered from error
            where = self.config.base_url or "the teacher's endpoint"
            raise StormError(f"{where} refuses the request: {error}") from error


def _completion(raw: bytes) -> dict[str, Any] | None:
    """A chat completion, or None for a body that was cut off or is something else."""
    try:
        response = json.loads(raw)
        return response if isinstance(response["choices"][0]["message"], dict) else None
    except (ValueError, LookupError, TypeError):
        return None


def _json_part(text: str) -> str:
    """What is between the outermost braces: some models wrap their JSON in a code fence."""
    start, end = text.find("{"), text.rfind("}")
    return text[start : end + 1] if 0 <= start < end else text
