"""`storm serve`: it answers what the pipeline answers, and lets nothing in that does not belong."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn
from command_line import run_storm
from prometheus_client import CollectorRegistry

from storm_vlm.data.collator import Question
from storm_vlm.data.row import Row
from storm_vlm.data.video import Clip, read_video
from storm_vlm.errors import StormError
from storm_vlm.inference.pipeline import Answer, StormPipeline
from storm_vlm.lab.bench.serve import serving as flooded
from storm_vlm.lab.bench.serve import soaked
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.serving import source
from storm_vlm.serving.app import create_app
from storm_vlm.serving.config import ServeConfig
from storm_vlm.serving.engine import Engine, Event, Job
from storm_vlm.serving.gate import Gate
from storm_vlm.serving.protocol import ChatRequest
from storm_vlm.serving.reader import ClipReaders
from storm_vlm.serving.serve import serve
from storm_vlm.serving.source import SourceError, is_public, video_file

QUESTION = "Where will the ball be after 5 more steps?"


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


class Running:
    """A server in a thread, and OpenAI's own client for it."""

    def __init__(self, server: uvicorn.Server, app: Any, key: str | None) -> None:
        self.server, self.app = server, app
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key or "none", max_retries=0
        )

    def ask(self, url: str | None, question: str = QUESTION, **options: Any) -> Any:
        parts: list[Any] = [{"type": "text", "text": question}]
        if url is not None:
            parts.insert(0, {"type": "video_url", "video_url": {"url": url}})
        messages: Any = [{"role": "user", "content": parts}]
        return self.client.chat.completions.create(model="storm", messages=messages, **options)

    def refused(self, url: str | None, **options: Any) -> tuple[int, str]:
        with pytest.raises(openai.APIStatusError) as error:
            self.ask(url, **options)
        assert {"message", "type", "param", "code"} == set(error.value.body)  # type: ignore[arg-type]
        return error.value.status_code, error.value.body["message"]  # type: ignore[index]

    def figure(self, name: str) -> float:
        lines = self.raw("GET", "/metrics")[1].decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))

    def raw(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, bytes, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


@contextmanager
def serving(
    pipeline: StormPipeline,
    key: str | None = None,
    add: Callable[[Any], object] = lambda _: None,
    **fields: Any,
) -> Iterator[Running]:
    config = ServeConfig.model_validate({"readers": 1, **fields})
    engine = Engine(pipeline, config.batch_size)
    app = create_app(engine, "storm", config, key)
    add(app)
    settings = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=10)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(server, app, key)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


@pytest.fixture(scope="module")
def running(storm: StormPipeline, reasoning_file: Path) -> Iterator[Running]:
    limits = {"max_mib": 1, "read_seconds": 20, "private": True}
    with serving(storm, root=reasoning_file.parent, **limits) as server:
        yield server


@contextmanager
def web(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a web server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def file_server(folder: Path) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write((folder / handler.path.lstrip("/")).read_bytes())

    return answer


class Stall:
    """A web server whose answer comes when it is let."""

    def __init__(self, answer: bytes = b"") -> None:
        self.asked, self.let, self.answer = threading.Event(), threading.Event(), answer

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.set()
        self.let.wait(30)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(self.answer)


def data_url(path: str | Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def soon(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


# What is answered


def test_openais_client_gets_the_pipelines_answers(
    running: Running, storm: StormPipeline, reasoning_rows: list[Row]
) -> None:
    for mode in ("force", "auto", "off"):
        pipeline = StormPipeline(storm.model, storm.processor, latent_mode=mode)
        expected = pipeline.answer_batch(reasoning_rows, 64)
        options = {"max_tokens": 64, "extra_body": {"latent_mode": mode}}
        with ThreadPoolExecutor(len(expected)) as pool:  # together, so in batches
            replies = list(
                pool.map(
                    lambda row: running.ask(data_url(row.video), row.question, **options),  # noqa: B023
                    reasoning_rows,
                )
            )
        for reply, answer in zip(replies, expected, strict=True):
            assert reply.choices[0].message.content == answer.text
            cut = answer.tokens == 64  # of the modes, "off" may ramble: it was not trained for it
            assert reply.choices[0].finish_reason == ("length" if cut else "stop")
            used = reply.usage
            assert used.completion_tokens_details.reasoning_tokens == answer.slots_used
            assert used.completion_tokens == answer.tokens + answer.slots_used
            assert used.prompt_tokens == answer.prompt_tokens
    assert running.figure("storm_answers_total") >= 3 * len(reasoning_rows)


def test_pieces_add_up_to_the_answer(running: Running, reasoning_rows: list[Row]) -> None:
    lengths = []
    for row in reasoning_rows[:4]:
        whole = running.ask(data_url(row.video), row.question)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = running.ask(data_url(row.video), row.question, **options)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == whole.choices[0].message.content
        lengths.append(len(pieces))
        assert chunks[-1].choices[0].finish_reason == "stop" and last.usage == whole.usage
    assert max(lengths) > 3  # a head, more than one piece of text, an end


def test_a_clip_comes_as_bytes_from_the_web_or_from_the_servers_folder(
    running: Running, reasoning_rows: list[Row], reasoning_file: Path
) -> None:
    path = Path(reasoning_rows[0].video)
    name = path.relative_to(reasoning_file.parent)
    expected = running.ask(data_url(path)).choices[0].message.content
    with web(file_server(reasoning_file.parent)) as address:
        for url in (str(name), str(path), f"file://{path}", f"{address}/{name}"):
            assert running.ask(url).choices[0].message.content == expected
    assert running.ask(None).usage.prompt_tokens_details.video_tokens == 0


def test_sampling_follows_its_seed(running: Running) -> None:
    options = {"temperature": 2.0, "max_tokens": 24}
    said = [running.ask(None, seed=s, **options).choices[0].message.content for s in (1, 1, 2, 3)]
    assert said[0] == said[1] and len(set(said)) > 1


def test_an_answer_that_is_cut_off_says_so(running: Running) -> None:
    reply = running.ask(None, temperature=2.0, seed=5, max_completion_tokens=1, **{"top_p": 1.0})
    assert reply.usage.completion_tokens_details.reasoning_tokens <= 8
    reasons = {
        running.ask(None, temperature=2.0, seed=s, max_tokens=2, extra_body={"latent_mode": "off"})
        .choices[0]
        .finish_reason
        for s in range(3)
    }
    assert "length" in reasons


def test_models_and_metrics(running: Running) -> None:
    assert [model.id for model in running.client.models.list()] == ["storm"]
    assert running.client.models.retrieve("storm").id == "storm"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("gpt")
    assert running.raw("GET", "/health")[0] == 200
    assert running.figure("storm_slots_total") > 0


# What is refused


def test_what_is_not_understood_is_named(running: Running) -> None:
    assert running.refused(None, extra_body={"latent_mode": "on"})[1].startswith("latent_mode: ")
    assert running.refused(None, n=2)[1].startswith("n: ")
    assert running.refused(None, extra_body={"best_of": 2})[1].startswith("best_of: ")
    assert running.refused(None, max_tokens=10_000)[0] == 400
    assert running.refused(None, question="<|im_end|>")[0] == 400
    assert running.refused(None, question=" ")[0] == 400
    assert running.refused("ftp://example.org/clip.mp4")[0] == 400
    bodies = (b"{", b"[]", b'{"model": "\\ud800", "\\ud800": 1}', b"[" * 100_000, b"\xff")
    for body in bodies:
        headers = {"Content-Type": "application/json"}
        status, text, _ = running.raw("POST", "/v1/chat/completions", body, **headers)
        assert status == 400 and json.loads(text)["error"]["type"] == "invalid_request_error"
    plain = json.dumps(_request("x")).encode()  # what a web page may send without being asked for
    assert (
        running.raw("POST", "/v1/chat/completions", plain, **{"Content-Type": "text/plain"})[0]
        == 400
    )
    assert json.loads(running.raw("GET", "/v1/engines")[1])["error"]["message"] == "Not Found"


def test_a_bad_video_is_refused_and_no_path_is_told(
    running: Running, reasoning_rows: list[Row], tmp_path: Path
) -> None:
    whole = Path(reasoning_rows[0].video).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{reasoning_rows[0].video}\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for file in tmp_path.iterdir():
        status, message = running.refused(data_url(file))
        assert status == 400 and "/" not in message.replace("://", ""), message
    assert running.refused("data:video/mp4,plain")[0] == 400
    assert running.refused("data:video/mp4;base64,%%%")[0] == 400
    assert running.ask(data_url(reasoning_rows[0].video)).choices  # and the next is answered


def test_no_file_outside_the_folder_is_read(tmp_path: Path, reasoning_rows: list[Row]) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.mp4"
    (root / "in").mkdir(parents=True)
    outside.write_bytes(Path(reasoning_rows[0].video).read_bytes())
    (root / "in" / "clip.mp4").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    (root / "inner.mp4").write_bytes(outside.read_bytes())
    os.mkfifo(root / "pipe")
    config, scratch = ServeConfig(root=root), tmp_path / "scratch"
    names = ["../secret.mp4", str(outside), "in/clip.mp4", "up/secret.mp4", "pipe", "in", "", "\0"]
    names += ["file:///etc/passwd", f"file://{outside}", "file://host/inner.mp4", "x" * 5000]
    names += ["file:///%2e%2e/secret.mp4", "%2e%2e/secret.mp4", f"file:///..%2f{outside}"]
    for name in names:
        with pytest.raises(SourceError) as error:
            video_file(name, config, scratch)
        assert str(tmp_path) not in str(error.value)
    assert video_file("inner.mp4", config, scratch) == root / "inner.mp4"
    with pytest.raises(SourceError):
        video_file("inner.mp4", ServeConfig(), scratch)


# Special-purpose addresses of IANA's registries (RFC 6890 and its updates), and ways to write them.
INNER = """0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 127.1.2.3 169.254.169.254 172.16.0.1 192.0.2.1 192.168.0.1
198.18.0.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1 ::ffff:169.254.169.254
64:ff9b::7f00:1 64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:7f00:1:: fc00::1 fd00:ec2::254 fe80::1%eth0 ff02::1"""


def test_which_addresses_are_public() -> None:
    assert [address for address in INNER.split() if is_public(address)] == []
    assert is_public("93.184.215.14") and is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


def test_only_the_public_internet_is_asked(monkeypatch, tmp_path: Path) -> None:
    config, scratch = ServeConfig(), tmp_path / "scratch"
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
        with pytest.raises(SourceError, match=r"public internet"):
            video_file(f"http://{host}:1/clip.mp4", config, scratch)

    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "http://127.0.0.2:9/inner")
        handler.end_headers()

    with web(elsewhere) as address:  # a hop of a redirect is looked at, too
        monkeypatch.setattr(source, "is_public", lambda address: address == "127.0.0.1")
        with pytest.raises(SourceError, match=r"public internet"):
            video_file(address, config, scratch)


def test_a_name_is_looked_up_once(monkeypatch, tmp_path: Path) -> None:
    """DNS rebinding: the second answer, another address, is never asked for."""
    answers = iter(["93.184.215.14", "127.0.0.1"])
    reached = []

    def lookup(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address: tuple[str, int], timeout: Any) -> Any:
        reached.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(SourceError):
        video_file("http://rebind.example/clip.mp4", ServeConfig(), tmp_path / "scratch")
    assert reached == ["93.184.215.14"]


def test_size_length_and_time_are_bounded(
    running: Running, storm: StormPipeline, reasoning_rows: list[Row]
) -> None:
    status, message = running.refused("data:video/mp4;base64," + "A" * 2_000_000)
    assert status == 413 and "1,048,576" in message
    chunks = iter([b"x" * 65536] * 40)
    assert running.raw("POST", "/v1/chat/completions", chunks)[0] == 413  # without a length
    values = b'{"model":"storm","messages":[{"role":"user","content":[' + b"{}," * 200_000
    began = time.monotonic()
    status, text, _ = running.raw("POST", "/v1/chat/completions", values)
    assert status == 413 and b"2,000 commas" in text and time.monotonic() - began < 2
    with web(lambda handler: _endless(handler)) as address:
        assert "bytes" in running.refused(address)[1]
    url = data_url(reasoning_rows[0].video)
    for limit in ({"max_pixels": 100}, {"max_frames": 2}, {"max_seconds": 0.5}):
        with serving(storm, **limit) as small:
            assert "this server takes" in small.refused(url)[1]


def _endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    with pytest.raises(OSError):
        while True:
            handler.wfile.write(b"x" * 65536)


def test_what_comes_with_a_request_that_needs_no_key_is_not_kept() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])

    async def ask(path: str) -> None:
        bodies = [{"type": "http.request", "body": b"x" * 9}]

        async def receive() -> Any:
            return bodies.pop() if bodies else await asyncio.Event().wait()

        scope = {"type": "http", "path": path, "headers": [(b"host", b"localhost")]}
        await Gate(app, ServeConfig(), None, CollectorRegistry())(scope, receive, receive)

    for path in ("/health", "/v1/chat/completions"):
        asyncio.run(ask(path))
    assert seen == [b"", b"x" * 9]


def test_the_key_opens_and_nothing_else(storm: StormPipeline) -> None:
    with serving(storm, key="s3cret") as server:
        assert server.ask(None).choices
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert server.raw("GET", path)[0] == 401
        for key in ("", "s3cre", "Bearer", "Bearer s3cret2", "Bearer \xff"):
            assert server.raw("GET", "/v1/models", Authorization=key)[0] == 401
        assert server.raw("GET", "/health")[0] == 200


def test_without_a_key_only_this_machine_is_answered(running: Running) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert running.raw("GET", "/v1/models", Host=host)[0] == 403
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80"):
        assert running.raw("GET", "/v1/models", Host=host)[0] == 200
    with pytest.raises(StormError, match="STORM_API_KEY"):
        serve("nowhere", ServeConfig(host="0.0.0.0"), print)


# What breaks


def test_a_full_server_refuses_and_a_client_that_leaves_makes_room(storm: StormPipeline) -> None:
    stall = Stall()
    with serving(storm, queue=1, private=True) as server, web(stall) as address:
        leaving = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps(_request(address)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        leaving.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert stall.asked.wait(10)
        with pytest.raises(openai.RateLimitError) as full:
            server.ask(None)
        assert int(full.value.response.headers["retry-after"]) >= 1
        assert server.raw("GET", "/health")[0] == 200 and server.figure("storm_requests_in_hand")
        leaving.close()
        assert soon(lambda: server.figure("storm_requests_in_hand") == 0)
        assert server.ask(None).choices
        stall.let.set()


def _request(url: str) -> dict[str, Any]:
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"model": "storm", "messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("roles", [["system", "user"], ["user", "assistant", "user"], ["tool"]])
def test_a_conversation_is_refused_in_words(roles: list[str]) -> None:
    messages = [{"role": role, "content": QUESTION} for role in roles]
    with pytest.raises(ValueError, match=f"one message of the role user, not {len(roles)}"):
        ChatRequest.model_validate({"model": "storm", "messages": messages})


def test_time_is_up(storm: StormPipeline, reasoning_rows: list[Row]) -> None:
    stall = Stall()
    with web(stall) as address:
        with serving(storm, private=True, read_seconds=1) as server:
            assert "took more than 1 s" in server.refused(address)[1]  # its process is ended
            assert server.ask(data_url(reasoning_rows[0].video)).choices
        with serving(storm, private=True, request_seconds=1) as server:
            assert server.refused(address)[0] == 504
            assert server.figure("storm_requests_in_hand") == 0
        stall.let.set()


def test_a_reader_that_is_killed_is_replaced(storm: StormPipeline, reasoning_rows) -> None:
    path = reasoning_rows[0].video
    expected = read_video(path, 6)
    stall = Stall(Path(path).read_bytes())
    readers = ClipReaders(6, ServeConfig(readers=1, private=True))
    reader = readers._readers[0]
    with ExitStack() as stack:
        stack.callback(readers.close)
        address = stack.enter_context(web(stall))
        os.kill(reader.process.pid or 0, signal.SIGKILL)
        clip = readers._read(data_url(path))
        assert np.array_equal(clip.frames, expected.frames)
        assert np.array_equal(clip.timestamps, expected.timestamps)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(readers._read, address)
            assert stall.asked.wait(10)
            stall.let.set()
            os.kill(reader.process.pid or 0, signal.SIGKILL)  # amid its work: done once more
            assert np.array_equal(reading.result(20).frames, expected.frames)
    assert not reader.process.is_alive()


def test_a_reader_that_gets_not_ready_is_not_waited_for(monkeypatch, reasoning_rows) -> None:
    monkeypatch.setattr("storm_vlm.serving.reader.START", 0)
    readers = ClipReaders(6, ServeConfig(readers=1))
    with pytest.raises(SourceError, match="ask again later"):
        readers._read(data_url(reasoning_rows[0].video))
    monkeypatch.undo()
    assert len(readers._read(data_url(reasoning_rows[0].video)).frames) == 6
    readers.close()


IMPORTS_MUCH = """
import mmap, sys
from storm_vlm.serving.config import ServeConfig
from storm_vlm.serving.reader import MEMORY, ClipReaders
held = mmap.mmap(-1, MEMORY + 2**30)  # in a reader, too, which imports its server's script
if __name__ == "__main__":
    readers = ClipReaders(2, ServeConfig(readers=1))
    print(len(readers._read(sys.stdin.read()).frames))
    readers.close()
"""


def test_a_reader_has_memory_beside_what_it_imports(tmp_path: Path, reasoning_rows) -> None:
    (script := tmp_path / "script.py").write_text(IMPORTS_MUCH)
    done = subprocess.run(
        [sys.executable, script],
        input=data_url(reasoning_rows[0].video),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


def test_one_bad_question_does_not_harm_its_neighbours(
    storm: StormPipeline, reasoning_rows
) -> None:
    engine = Engine(storm, 8)
    told: list[list[Event]] = [[], [], []]
    thin = Clip(np.zeros((4, 1, 999, 3), np.uint8), np.arange(4.0), "the video")
    videos = [reasoning_rows[0].video, thin, reasoning_rows[1].video]
    with engine._changed:  # so that they meet in one batch
        for video, events in zip(videos, told, strict=True):
            engine.submit(Job(Question(video, QUESTION), "force", 16, events.append))
    engine.close()
    assert isinstance(told[1][-1], StormError)
    for events, video in ((told[0], videos[0]), (told[2], videos[2])):
        answer = events[-1]
        assert isinstance(answer, Answer) and answer.text == storm.answer(video, QUESTION).text
        assert "".join(event for event in events if isinstance(event, str)) == answer.text


def test_a_row_whose_client_left_is_ended(storm: StormPipeline) -> None:
    told: list[Event] = []
    engine = Engine(storm, 8)
    long = {"min_new_tokens": 300, "temperature": 1.0}

    def tell(event: Event) -> None:
        told.append(event)
        job.abandon()

    job = Job(Question(None, QUESTION), "off", 400, tell, long)
    engine.submit(job)
    engine.submit(Job(Question(None, QUESTION), "off", 16, print, abandoned=True))
    engine.close()
    assert isinstance(told[-1], Answer) and told[-1].tokens < 50


def test_what_breaks_inside_is_not_told(storm: StormPipeline, monkeypatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret of /root/model")

    with serving(storm) as server:
        monkeypatch.setattr(StormPipeline, "answer_batch", broken)
        status, message = server.refused(None)
        assert status == 500 and "secret" not in message
        monkeypatch.undo()
        assert server.ask(None).choices


def test_what_is_in_hand_is_answered_before_the_end(storm: StormPipeline, reasoning_rows) -> None:
    stall = Stall(Path(reasoning_rows[0].video).read_bytes())
    with ExitStack() as stack:
        address, pool = stack.enter_context(web(stall)), ThreadPoolExecutor(1)
        server = stack.enter_context(serving(storm, private=True))
        asked = pool.submit(server.ask, address)
        assert stall.asked.wait(10)
        server.server.should_exit = True
        time.sleep(0.3)
        stall.let.set()
        assert asked.result(20).choices[0].finish_reason == "stop"


def test_the_other_engine_names_what_it_needs() -> None:
    result = run_storm("serve", "--engine", "vllm")
    assert result.exit_code == 1 and "pip install vllm" in result.stderr


def test_replicas_name_what_they_need() -> None:
    with suppress(ImportError):
        import ray.serve

        pytest.skip(f"{ray.serve.__name__} is installed")
    result = run_storm("serve", "--ray")
    assert result.exit_code == 1 and "pip install 'storm-vlm[replicas]'" in result.stderr


def test_what_is_rays_alone_says_so() -> None:
    assert "add --ray" in run_storm("serve", "--replicas", "2").stderr
    assert "leave --engine" in run_storm("serve", "--ray", "--engine", "vllm").stderr


def test_every_client_of_a_flood_is_answered_or_refused(reasoning_rows: list[Row]) -> None:
    with flooded() as server:
        soak = asyncio.run(soaked(server, reasoning_rows, 2))
    assert soak.lost == 0 and soak.outcomes["200"] and soak.readers_killed
    assert server.process.returncode == 143
