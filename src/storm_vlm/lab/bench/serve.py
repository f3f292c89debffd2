"""`storm serve` measured: what it costs over the pipeline itself, and what it stands.

Costs are seconds of CPU, of all the server's processes: where others use a machine, too, the clock says little.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.row import Row, read_rows
from storm_vlm.errors import StormError
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.versions import commit, versions

SCENES = 16
QUESTIONS = 64  # of a round, so that a clock of hundredths of a second will do
PATIENCE = 60.0  # seconds until a client counts its request as lost
KINDS = {"ask": 10, "stream": 5, "leave": 2, "slow": 2, "corrupt": 2}  # of clients, by weight
BODY = {"model": "storm", "max_tokens": 32}


@dataclass(frozen=True)
class Cost:
    """Of an answer, at one concurrency; the pipeline is asked in batches of as many."""

    concurrency: int
    served_cpu: float  #: seconds
    pipeline_cpu: float
    ratio: float


@dataclass(frozen=True)
class Soak:
    """What became of twice as many clients as the server can answer."""

    seconds: float
    capacity: float  #: answers a second, measured before
    clients: dict[str, int]  #: by kind
    outcomes: dict[str, int]  #: a status; "refused": a broken video; or what counts as lost
    lost: int  #: no answer, half of one, or a fault of the server's
    readers_killed: int
    memory_mib: list[float]  #: of the server, the medians of four quarters of the time


def bench_serve(rounds: int, soak: float, results: Path | None = None) -> dict[str, Any]:
    """Costs at 1, 8 and 32 questions at a time; with `soak` seconds, what a server stands for so long."""
    report: dict[str, Any] = {"commit": commit(), "versions": versions()}
    with TemporaryDirectory() as folder:
        rows = read_rows(build_world(folder, "reasoning", "test", SCENES))
        with serving() as server:
            report["costs"] = [asdict(_cost(server, rows, count, rounds)) for count in (1, 8, 32)]
            if soak:
                report["soak"] = asdict(asyncio.run(soaked(server, rows, soak)))
    if results is not None:
        known = json.loads(results.read_text()) if results.exists() else {}
        write_json(results, {**known, **report})
    return report


class Server:
    """`storm serve` with the shipped model, in processes of its own. `options` are more of the command's."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "storm_vlm", "serve", "--port", "0", "--max-mib", "1"]
        command += options
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        said = self.process.stdout.readline()
        if not said:
            raise StormError("the server did not start: run storm serve to see why")
        self.port = int(said.rpartition(":")[2].partition("/")[0])
        self.system = psutil.Process(self.process.pid)

    @property
    def cpu(self) -> float:
        times = [p.cpu_times() for p in (self.system, *self.system.children(recursive=True))]
        return sum(spent.user + spent.system for spent in times)

    async def ask(self, body: dict[str, Any], pause: float = 0.0) -> str:
        """The status, or what is amiss. `pause`: seconds before each tenth of the request."""
        text = json.dumps(body)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        data = (head + text).encode()
        size = len(data) // 10 + 1 if pause else len(data)
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with contextlib.closing(writer):
                    for start in range(0, len(data), size):
                        await asyncio.sleep(pause)
                        writer.write(data[start : start + size])
                        await writer.drain()
                    answer = (await reader.read()).decode()
        except (OSError, TimeoutError) as error:
            return type(error).__name__
        status = answer[9:12]
        whole = "[DONE]" if body.get("stream") and status == "200" else "}"
        return status if whole in answer[-24:] else f"half of {status}"


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    server = Server(*options)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(PATIENCE)
        finally:
            server.process.kill()


def _cost(server: Server, rows: Sequence[Row], count: int, rounds: int) -> Cost:
    pipeline = StormPipeline.from_pretrained(str(shipped("storm")))
    batch = [rows[i % len(rows)] for i in range(count)]
    bodies = [_body(row.question, Path(row.video).read_bytes()) for row in batch]

    async def serve() -> None:
        outcomes = await asyncio.gather(*map(server.ask, bodies))
        if set(outcomes) != {"200"}:
            raise StormError(f"a question was not answered: {Counter(outcomes)}")

    served, direct = [], []
    for _ in range(rounds + 1):
        began = server.cpu
        for _ in range(QUESTIONS // count):
            asyncio.run(serve())
        served.append((server.cpu - began) / QUESTIONS)
        began = time.process_time()
        for _ in range(QUESTIONS // count):
            pipeline.answer_batch(batch, 32)
        direct.append((time.process_time() - began) / QUESTIONS)
    ratios = [a / b for a, b in zip(served, direct, strict=True)]
    # The first round warms up.
    return Cost(count, *(statistics.median(values[1:]) for values in (served, direct, ratios)))


async def soaked(server: Server, rows: Sequence[Row], seconds: float) -> Soak:
    """Clients of all kinds, twice as many as can be answered."""
    clips = [Path(row.video).read_bytes() for row in rows]
    bodies = [_body(row.question, clip) for row, clip in zip(rows, clips, strict=True)]
    corrupt = _body(rows[0].question, clips[0][: len(clips[0]) // 2])
    draw = random.Random(0)

    async def client(kind: str) -> str:
        body = draw.choice(bodies)
        if kind == "corrupt":
            status = await server.ask(corrupt)
            return "refused" if status == "400" else status
        if kind == "leave":
            try:
                async with asyncio.timeout(draw.uniform(0, 0.5)):
                    return await server.ask(body)
            except TimeoutError:
                return "left"
        return await server.ask(
            {**body, "stream": kind == "stream"}, draw.uniform(0.05, 0.3) * (kind == "slow")
        )

    async def closed_loop(until: float) -> int:
        count = 0
        while time.monotonic() < until:
            count += await server.ask(draw.choice(bodies)) == "200"
        return count

    span = min(5.0, seconds)
    await asyncio.gather(*(server.ask(body) for body in bodies))  # warm
    loops = [closed_loop(time.monotonic() + span) for _ in range(8)]
    capacity = sum(await asyncio.gather(*loops)) / span
    clients: list[tuple[str, asyncio.Task[str]]] = []
    memory: list[float] = []
    killed, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        while len(clients) < 2 * capacity * passed:
            (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
            clients.append((kind, asyncio.create_task(client(kind))))
        memory.append(server.system.memory_info().rss / 2**20)
        if passed > seconds * (killed + 1) / 3:
            readers = [p for p in server.system.children() if "spawn_main" in " ".join(p.cmdline())]
            min(readers, key=psutil.Process.create_time).kill()  # not one that was just begun
            killed += 1
        await asyncio.sleep(0.05)
    outcomes = Counter(await asyncio.gather(*(task for _, task in clients)))
    good = {"200", "refused", "429", "left"}
    quarters = [memory[len(memory) * i // 4 : len(memory) * (i + 1) // 4] for i in range(4)]
    return Soak(
        seconds,
        capacity,
        dict(Counter(kind for kind, _ in clients)),
        dict(outcomes),
        sum(count for outcome, count in outcomes.items() if outcome not in good),
        killed,
        [statistics.median(quarter) for quarter in quarters],
    )


def _body(question: str, clip: bytes) -> dict[str, Any]:
    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    video = {"type": "video_url", "video_url": {"url": url}}
    content = [video, {"type": "text", "text": question}]
    return {**BODY, "messages": [{"role": "user", "content": content}]}
