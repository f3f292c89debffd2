"""`storm serve --ray`: replicas on Ray Serve answer as the pipeline does, though one is killed under load."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from command_line import run_storm

from storm_vlm.data.row import Row
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.bench.serve import Server, serving
from storm_vlm.lab.checkpoints import shipped

pytest.importorskip("ray.serve", reason="needs the extra `replicas`")
CLIENTS, SECONDS = 12, 12.0
QUESTIONS = {"whole": {}, "streamed": {"stream": True}, "sampled": {"temperature": 1.5, "seed": 7}}


def replicas(server: Server) -> list[int]:
    """Their processes."""
    found = server.system.children(recursive=True)
    return [p.pid for p in found if "ray::ServeReplica" in " ".join(p.cmdline())]


def soon(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.2)
    return condition()


def ask(client: openai.OpenAI, row: Row, kind: str) -> str:
    url = "data:video/mp4;base64," + base64.b64encode(Path(row.video).read_bytes()).decode()
    parts = [{"type": "video_url", "video_url": {"url": url}}]
    content: Any = [*parts, {"type": "text", "text": row.question}]
    options = {"model": "storm", "messages": [{"role": "user", "content": content}]}
    reply: Any = client.chat.completions.create(**options, max_tokens=32, **QUESTIONS[kind])
    if kind != "streamed":
        return reply.choices[0].message.content
    chunks = list(reply)
    assert chunks[-1].choices[0].finish_reason == "stop"
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_replica_is_killed_and_every_client_is_answered(
    reasoning_rows: list[Row], capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = StormPipeline.from_pretrained(str(shipped("storm")))
    rows = reasoning_rows[:4]
    greedy = [answer.text for answer in pipeline.answer_batch(rows)]
    with serving("--ray", "--replicas", "2") as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        expected = {
            (kind, index): greedy[index] if kind != "sampled" else ask(client, row, kind)
            for kind in QUESTIONS
            for index, row in enumerate(rows)
        }
        before = replicas(server)
        assert len(before) == 2
        until = time.monotonic() + SECONDS

        def closed_loop(_: int) -> Counter[str]:
            outcomes: Counter[str] = Counter()
            while time.monotonic() < until:
                for (kind, index), text in expected.items():
                    try:
                        right = ask(client, rows[index], kind) == text
                    except openai.OpenAIError as error:
                        outcomes[repr(error)] += 1
                    else:
                        outcomes[kind if right else f"another answer, {kind}"] += 1
            return outcomes

        with ThreadPoolExecutor(CLIENTS) as pool:
            loops = pool.map(closed_loop, range(CLIENTS))
            time.sleep(SECONDS / 3)
            os.kill(before[0], signal.SIGKILL)
            outcomes = sum(loops, Counter[str]())
        assert set(outcomes) == set(QUESTIONS), outcomes
        assert "asked again" in capfd.readouterr().err  # some were in its hands
        assert soon(lambda: len(replicas(server)) == 2)  # Ray Serve has begun another
        now = replicas(server)
        assert before[0] not in now and before[1] in now
        children = server.system.children(recursive=True)
    assert server.process.returncode == 143
    assert psutil.wait_procs(children, 10)[1] == []


def test_more_replicas_than_processors_are_refused() -> None:
    result = run_storm("serve", "--ray", "--replicas", "999")
    assert result.exit_code == 1 and "lower --replicas" in result.stderr
