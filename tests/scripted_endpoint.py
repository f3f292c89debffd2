"""An endpoint that plays a scripted model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from stub_teacher import StubTeacher, completion, send

Script = Callable[[list[dict[str, Any]]], str | int | dict[str, Any] | bytes]


@contextmanager
def serving(script: Script) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the requests that it gets. `script` makes of the messages a text, an error's status, a
    whole body, or what is no JSON."""
    requests: list[dict[str, Any]] = []

    class Scripted(StubTeacher):
        def respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
            requests.append(body)
            said = script(body["messages"])
            if isinstance(said, str):
                send(handler, 200, completion(said))
            elif isinstance(said, dict):
                send(handler, 200, said)
            elif isinstance(said, bytes):
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(said)))
                handler.end_headers()
                handler.wfile.write(said)
            else:
                send(handler, said, {"error": {"message": "no such thing", "code": "bad"}})

    with Scripted() as server:
        yield server.url, requests
