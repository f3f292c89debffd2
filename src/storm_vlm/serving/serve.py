"""`storm serve`: the right engine for a checkpoint, until it is told to stop."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from storm_vlm.errors import StormError
from storm_vlm.serving.config import LOOPBACK, ServeConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY = "STORM_API_KEY"  # environment variable; an option could be read by everyone on the machine
CONNECTIONS = 1000


def serve(
    checkpoint: str,
    config: ServeConfig,
    say: Callable[[str], None],
    add: Callable[[FastAPI], str] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; what is in hand then is answered first.

    `add` may add to the server; it returns the path to name to people.

    Raises:
        StormError: an address needs a key or is taken, or the checkpoint cannot be loaded.
    """
    import uvicorn

    from storm_vlm.inference.pipeline import StormPipeline
    from storm_vlm.serving.app import create_app

    key = _key(config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise StormError(
            f"{config.host} port {config.port} cannot be listened on ({error}): choose another --port"
        ) from error
    with listener:
        name = config.name or Path(checkpoint).expanduser().resolve().name
        app = create_app(StormPipeline.from_pretrained(checkpoint), name, config, key)
        path = add(app) if add else "/v1"
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"{name} answers at http://{shown}:{port}{path}")
        settings = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=config.drain_seconds,
        )
        uvicorn.Server(settings).run(sockets=[listener])


def hand_over(checkpoint: str, config: ServeConfig) -> None:
    """Become `vllm serve`, with our plugin. Does not return. Raises StormError where either is missing."""
    program = shutil.which("vllm")
    if program is None or find_spec("storm_vlm.serving.vllm") is None:
        raise StormError(
            "--engine vllm needs vLLM and a storm-vlm that has a plugin for it: install both in one environment "
            "(pip install vllm), or leave the option out"
        )
    if key := _key(config):
        os.environ["VLLM_API_KEY"] = key
    options = [f"--host={config.host}", f"--port={config.port}"]
    options += [f"--served-model-name={config.name}"] if config.name else []
    options += [f"--allowed-local-media-path={config.root.resolve()}"] if config.root else []
    os.execv(program, [program, "serve", checkpoint, *options])


def _key(config: ServeConfig) -> str | None:
    key = os.environ.get(KEY) or None
    if key is None and config.host not in LOOPBACK:
        raise StormError(f"--host {config.host} lets other machines in: set {KEY} to a secret key")
    return key
