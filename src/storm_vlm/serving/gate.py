"""What holds for every request: who may ask, how much, how many at a time, how long; all of it before it is read."""

from __future__ import annotations

import asyncio
import hmac
import math
from contextlib import AsyncExitStack
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storm_vlm.serving.config import LOOPBACK, ServeConfig
from storm_vlm.serving.protocol import Refusal, error_response

OPEN = ("/health", "/play")  # paths that need no key, and are answered even by a full server
CHEAP = (*OPEN, "/metrics", "/v1/models")
COMMAS = 2000  # of a request's JSON: a million values take its checker a minute, in which nobody is answered


class Gate:
    """ASGI middleware. A request ends when its client leaves or its time is up, and takes its work along.

    `scope["storm.work"]` is an exit stack that is left with the request, however it ends.
    """

    def __init__(
        self, app: ASGIApp, config: ServeConfig, key: str | None, metrics: CollectorRegistry
    ) -> None:
        self.app, self.config, self.key = app, config, key
        self.held = 0  # requests in hand
        self.pace = 1.0  # seconds that one takes, roughly
        self.requests = Counter("storm_requests", "By status.", ["status"], registry=metrics)
        gauge = Gauge("storm_requests_in_hand", "Let in, and not answered yet.", registry=metrics)
        gauge.set_function(lambda: self.held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 499  # the client left

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        cheap = scope["path"] in CHEAP
        self.held += not cheap
        try:
            began = asyncio.get_running_loop().time()
            await self._pass(scope, receive, sending, cheap)
            if status == 200 and not cheap:
                spent = asyncio.get_running_loop().time() - began
                self.pace += 0.1 * (spent - self.pace)
        except Refusal as error:
            if status == 499:  # else an answer has begun, and breaks off
                await error_response(error)(scope, receive, sending)
        except _Gone:
            pass
        finally:
            self.held -= not cheap
            self.requests.labels(status).inc()

    async def _pass(self, scope: Scope, receive: Receive, send: Send, cheap: bool) -> None:
        try:
            async with asyncio.timeout(self.config.request_seconds):
                refusal = self._refusal(scope, cheap)
                body = await self._body(receive, keep=refusal is None and not cheap)
                if scope["path"].startswith("/v1/") and body.count(b",") > COMMAS:
                    refusal = Refusal(
                        413, f"a request has at most {COMMAS:,} commas here", "too_large"
                    )
                if refusal is not None:
                    raise refusal
                await self._until_gone(scope, body, receive, send)
        except TimeoutError:
            seconds = self.config.request_seconds
            message = f"no answer within the {seconds:g} s of a request"
            raise Refusal(504, message, "timeout") from None

    def _refusal(self, scope: Scope, cheap: bool) -> Refusal | None:
        headers = Headers(scope=scope)
        if (
            self.key is None
        ):  # then for this machine alone, and not for web pages that are open on it
            host = headers.get("host", "").rpartition("@")[2]
            name = host.rpartition(":")[0].strip("[]") if ":" in host else host
            if name not in LOOPBACK:
                return Refusal(403, "without an API key this server answers to its own machine")
        elif scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                return Refusal(401, "the API key is missing or wrong", "invalid_api_key")
        if not cheap and self.held > self.config.queue:
            # Others wait as long as it, so half of a round's time is when a place is likely to be free.
            later = str(max(1, math.ceil(self.pace / 2)))
            return Refusal(429, "this server is full; try later", "queue_full", retry_after=later)
        return None

    async def _body(self, receive: Receive, keep: bool) -> bytes:
        """All of it, read even where it is not kept: a client must have sent it to see an answer."""
        most, body, size = self.config.max_bytes, bytearray(), 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            size += len(message.get("body", b""))
            if size > most:
                raise Refusal(413, f"a request has at most {most:,} bytes here", "too_large")
            if keep:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)

    async def _until_gone(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(receive())  # behind the body, only its leaving is left to hear
        messages = [{"type": "http.request", "body": body}]

        async def again() -> Any:
            return messages.pop() if messages else await asyncio.shield(gone)

        async with AsyncExitStack() as work:
            scope["storm.work"] = work
            running = asyncio.ensure_future(self.app(scope, again, send))
            try:
                await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    return running.result()
                raise _Gone
            finally:
                for task in (running, gone):
                    task.cancel()
                await asyncio.gather(running, gone, return_exceptions=True)


class _Gone(Exception):
    """The client has left."""
