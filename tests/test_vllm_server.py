"""`storm serve --engine vllm` and OpenAI's client: a part of `make test-vllm`."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from storm_vlm.data.prompt import build_messages
from storm_vlm.data.row import Row
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.checkpoints import shipped


@pytest.fixture(scope="module")
def client(reasoning_rows: list[Row]) -> Iterator[openai.OpenAI]:
    """Of `storm serve --engine vllm`, in processes of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = str(Path(str(reasoning_rows[0].video)).parent)
    command = ["-m", "storm_vlm", "serve", "--engine", "vllm", "--port", str(port), "--root", root]
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "STORM_API_KEY": "secret"}
    more |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    server = subprocess.Popen([sys.executable, *command], env={**os.environ, **more})
    try:
        made = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0
        )
        for _ in range(900):
            try:
                made.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None
                time.sleep(1)
        yield made
    finally:
        server.terminate()
        server.wait(60)


def question(row: Row, url: str | None = None) -> Any:
    video = {"type": "video_url", "video_url": {"url": url or Path(str(row.video)).as_uri()}}
    text = build_messages(row.question, row.options)[0]["content"][1]
    return [{"role": "user", "content": [video, text]}]


def test_openais_client_is_answered(client: openai.OpenAI, reasoning_rows: list[Row]) -> None:
    """In bfloat16, to which vLLM turns float32 models unless it is told otherwise: then most answers are the same."""
    assert [model.id for model in client.models.list()] == ["storm"]
    pipeline, same = StormPipeline.from_pretrained(str(shipped("storm"))), 0
    wanted = pipeline.answer_batch(reasoning_rows)
    for row, answer in zip(reasoning_rows, wanted, strict=True):
        reply = client.chat.completions.create(model="storm", messages=question(row))
        same += reply.choices[0].message.content == answer.text
        assert reply.usage.completion_tokens_details.reasoning_tokens == answer.slots_used  # type: ignore[union-attr]
    sys.stdout.write(f"\nover HTTP, in bfloat16: {same} of {len(wanted)} answers equal\n")
    assert same >= 0.8 * len(wanted)
    asked: Any = {"model": "storm", "messages": question(reasoning_rows[0])}
    less = client.chat.completions.create(**asked, extra_body={"vllm_xargs": {"latent_budget": 2}})
    assert less.usage.completion_tokens_details.reasoning_tokens == 2  # type: ignore[union-attr]
    off = client.chat.completions.create(**asked, extra_body={"vllm_xargs": {"latent_mode": "off"}})
    assert off.usage.completion_tokens_details.reasoning_tokens == 0  # type: ignore[union-attr]
    pieces = client.chat.completions.create(**asked, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == client.chat.completions.create(**asked).choices[0].message.content


def test_the_server_refuses_what_it_should(
    client: openai.OpenAI, reasoning_rows: list[Row]
) -> None:
    broken = "data:video/mp4;base64," + base64.b64encode(b"no video").decode()
    for url in (broken, "file:///etc/passwd", "http://127.0.0.1:9/clip.mp4"):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="storm", messages=question(reasoning_rows[0], url))
        assert "/tmp" not in str(refused.value)
    with pytest.raises(openai.BadRequestError, match="latent_mode must be one of"):
        client.chat.completions.create(
            model="storm",
            messages=question(reasoning_rows[0]),
            extra_body={"vllm_xargs": {"latent_mode": "on"}},
        )
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
