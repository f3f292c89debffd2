"""A teacher that costs nothing: a real HTTP server with made-up but valid answers, for dry runs and measurements."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

_WORDS = ("it", "glides", "slows", "turns", "rolls", "rises", "falls", "then", "rests")


@dataclass
class Call:
    """A request: its `Idempotency-Key`, when it came, when all of the answer was sent (None: not yet)."""

    key: str
    body: dict[str, Any]
    began: float
    sent: float | None = None

    @property
    def question(self) -> str:
        """What tells the rows apart, if no two ask the same."""
        return self.body["messages"][1]["content"][0]["text"].splitlines()[0]


class StubTeacher(ThreadingHTTPServer):
    """`with StubTeacher() as teacher:` serves chat completions at `teacher.url` and keeps account of the calls.

    The same request always gets the same answer. Tests override `respond` to misbehave.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.latency = latency
        self.calls: list[Call] = []
        self._open = 0  # connections
        self._counting = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def settle(self) -> None:
        """Wait until no connection is open: what a killed client had sent may still be under way."""
        quiet = 0
        while quiet < 3:
            time.sleep(0.01)
            quiet = 0 if self._open else quiet + 1

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._counting:
            self._open += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._counting:
            self._open -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed on purpose; a broken pipe is no news."""

    def respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send(handler, 200, completion(answer_to(body)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubTeacher

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = Call(self.headers.get("Idempotency-Key", ""), body, time.monotonic())
        self.server.calls.append(call)
        time.sleep(self.server.latency)
        self.server.respond(self, body)
        call.sent = time.monotonic()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def send(
    handler: BaseHTTPRequestHandler, status: int, data: dict[str, Any], **headers: str
) -> None:
    """Answer with JSON."""
    text = json.dumps(data).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text)
    handler.wfile.flush()


def completion(content: str | None, refusal: str | None = None) -> dict[str, Any]:
    """A chat completion with one message."""
    return {
        "id": "stub",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": content, "refusal": refusal},
            }
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }


def answer_to(body: dict[str, Any]) -> str:
    """A valid answer, chosen by the hash of what was asked."""
    asked = json.dumps(body["messages"], sort_keys=True).encode()
    number = int.from_bytes(hashlib.sha256(asked).digest()[:4])
    kind = body["response_format"]["json_schema"]["name"]
    if kind == "Keyframes":
        frames = sum(part["type"] == "image_url" for part in body["messages"][1]["content"])
        chosen = {number % frames, (number // 7) % frames, frames - 1}
        return json.dumps({"selected": sorted(chosen)})
    words = [_WORDS[(number + i * i) % len(_WORDS)] for i in range(90)]
    return json.dumps({"plan" if kind == "Plan" else "prompt": " ".join(words)})
