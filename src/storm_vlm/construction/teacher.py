"""The teacher: any OpenAI-compatible endpoint, asked once for each thing, whatever happens in between.

An HTTP response that is a chat completion is stored, and synced to disk, before it is used, under the hash of the
request. A later run that comes to the same request, be it a repair in the middle of a conversation, reads it from
there. So the only calls ever paid twice are those that a kill, a broken connection or a timeout catches between
the server's work and the `os.replace` of its response here. The key is sent along as `Idempotency-Key`, by which a
server may close even that gap. A conversation that came to nothing is set aside: the teacher may have been badly set
up, so the next run asks anew.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from storm_vlm.construction.config import TeacherConfig
from storm_vlm.construction.prompts import Messages, repair_message
from storm_vlm.data.store import Ledger, Store, key_of
from storm_vlm.inference.client import SHOWN, Endpoint, RefusedError, Response, read_completion

Answer = TypeVar("Answer", bound=BaseModel)


class BudgetReached(Exception):
    """`max_cost` is spent. Calls that were under way still count: it is passed by `workers` calls at most."""


@dataclass(frozen=True)
class TeacherReply(Generic[Answer]):
    """What the teacher answers.

    ``status``: `ok`, `repaired`, `refused` or `invalid`; ``value`` is None for the last two, and ``detail`` says what
    was wrong and what the teacher wrote. ``keys`` names the responses in the store, one for each turn.
    """

    value: Answer | None
    status: str
    keys: tuple[str, ...]
    detail: str = ""

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
            usage = told.get(path.stem) or _usage(read_completion(path.read_bytes()))
            self._add(path.stem, usage)

    def note(self, key: str, response: Response) -> None:
        """A response that is now in the store."""
        self._ledger.add(key, _usage(response))

    def move(self, key: str, other: str) -> None:
        """A response that has been set aside: it was paid, and its request may be again."""
        with self._lock:
            self._read_news()
            self._keys.discard(key)
            self._keys.add(other)

    def totals(self, config: TeacherConfig) -> dict[str, float]:
        """With the responses that have come since the last time."""
        with self._lock:
            self._read_news()
            cost = (self._prompt * config.price_in + self._completion * config.price_out) / 1e6
            return {
                "calls": len(self._keys),
                "prompt_tokens": self._prompt,
                "completion_tokens": self._completion,
                "cost": round(cost, 6),
            }

    def _read_news(self) -> None:
        for key, usage in self._ledger.news().items():
            self._add(key, usage)

    def _add(self, key: str, usage: str) -> None:
        if key not in self._keys:
            self._keys.add(key)
            prompt, completion = map(int, usage.split())
            self._prompt += prompt
            self._completion += completion


def _usage(response: Response | None) -> str:
    """Tokens of prompt and completion, as `usage.log` has them."""
    return f"{response.prompt_tokens} {response.tokens}" if response else "0 0"


class TeacherClient:
    """Safe to use from many threads."""

    def __init__(self, config: TeacherConfig, store: Store) -> None:
        self.config = config
        self.store = store
        self._endpoint = Endpoint(
            config.base_url, config.api_key_env, config.retries, config.timeout
        )
        self.spent = Spent(store)

    def ask(self, messages: Messages, kind: type[Answer], **context: Any) -> TeacherReply[Answer]:
        """An answer that is valid as `kind`, after `repairs` at most.

        Raises:
            UnansweredError: no response to be had: the row stays unfinished, for the next run.
            BudgetReached: before a call, never between a call and its storing.
            StormError: the endpoint refuses all requests (a wrong key, model or option): nothing will work.
        """
        keys: list[str] = []
        fault = wrote = ""
        for turn in range(self.config.repairs + 1):
            try:
                key, response = self._respond(messages, kind)
            except RefusedError as error:
                return self._nothing("refused", keys, str(error))
            keys.append(key)
            wrote = response.text or response.thoughts
            if response.fault == "filtered":
                return self._nothing("refused", keys, f"it declined, or was filtered: {wrote!r}")
            try:
                value = read_answer(kind, response.text, context)
            except ValidationError as error:
                fault = "; ".join(fault["msg"] for fault in error.errors())
                if response.fault == "cut_off":
                    fault = f"it is cut off at max_tokens={self.config.max_tokens}; {fault}"
                elif not response.text and wrote:
                    fault = f"all of it is reasoning_content, none content; {fault}"
                answer = {"role": "assistant", "content": response.text}
                messages = [*messages, answer, repair_message(fault)]
            else:
                return TeacherReply(value, "repaired" if turn else "ok", tuple(keys))
        return self._nothing("invalid", keys, f"{fault}. It wrote: {wrote[:SHOWN]!r}")

    def _nothing(self, status: str, keys: list[str], detail: str) -> TeacherReply[Any]:
        """A conversation without an answer; what was said is kept, but not for the next run to go on from."""
        aside = [self.store.set_aside("teacher", key) for key in keys]
        for key, other in zip(keys, aside, strict=True):
            self.spent.move(key, other)
        return TeacherReply(None, status, tuple(aside), detail)

    def _respond(self, messages: Messages, kind: type[BaseModel]) -> tuple[str, Response]:
        """The key and a chat completion, from the store if it is there."""
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
        stored = self.store.read("teacher", key, lambda path: read_completion(path.read_bytes()))
        if stored is not None:
            return key, stored
        limit = self.config.max_cost
        if limit is not None and self.spent.totals(self.config)["cost"] >= limit:
            raise BudgetReached
        raw, response = self._endpoint.complete(body, **{"Idempotency-Key": key})
        self.store.write("teacher", key, raw)
        self.spent.note(key, response)
        return key, response


def read_answer(kind: type[Answer], text: str, context: dict[str, Any]) -> Answer:
    """The text's last JSON object that is valid as `kind`: behind thoughts, in a code fence, with other keys, too.

    Raises ValidationError for the first object, or for a text without one.
    """
    text = text.rsplit("</think>", 1)[-1]
    decoder = json.JSONDecoder(strict=False)  # models break lines within strings
    found: list[Answer] = []
    faults: list[ValidationError] = []
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            known = {name: value[name] for name in kind.model_fields if name in value}
            found.append(kind.model_validate(known, context=context))
            start = text.find("{", end)
        except ValidationError as error:
            faults.append(error)
            start = text.find("{", start + 1)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    if found:
        return found[-1]
    if faults:
        raise faults[0]
    return kind.model_validate_json(text, context=context)
