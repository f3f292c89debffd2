"""`storm serve`: the right engine for a checkpoint, until it is told to stop."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from storm_vlm.errors import StormError
from storm_vlm.serving.config import LOOPBACK, ServeConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from storm_vlm.serving.engine import Engine
    from storm_vlm.serving.replicas import Replicas

KEY = "STORM_API_KEY"  # environment variable; an option could be read by everyone on the machine
CONNECTIONS = 1000


def serve(
    checkpoint: str,
    config: ServeConfig,
    say: Callable[[str], None],
    add: Callable[[FastAPI], str] | None = None,
    replicas: int = 0,
) -> None:
    """Serve until SIGINT or SIGTERM; what is in hand then is answered first.

    `add` may add to the server; it returns the path to name to people. `replicas`: on Ray Serve; 0: in this process.

    Raises:
        StormError: an address needs a key or is taken, or the checkpoint cannot be loaded.
    """
    import uvicorn

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
        with closing(_engine(checkpoint, name, config, replicas)) as engine:
            app = create_app(engine, name, config, key)
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


def _engine(checkpoint: str, name: str, config: ServeConfig, replicas: int) -> Engine | Replicas:
    from storm_vlm.inference.pipeline import StormPipeline
    from storm_vlm.serving.engine import Engine
    from storm_vlm.serving.replicas import Replicas

    if replicas:
        return Replicas(checkpoint, name, config.batch_size, replicas)
    return Engine(StormPipeline.from_pretrained(checkpoint), config.batch_size)


def hand_over(checkpoint: str, config: ServeConfig) -> None:
    """Become vLLM's server, with our plugin. Does not return.

    Raises StormError where vLLM is missing, or for a limit that it does not have.
    """
    if find_spec("vllm") is None:
        raise StormError(
            "--engine vllm needs vLLM in the environment of storm-vlm: install it (pip install vllm), or leave the "
            "option out"
        )
    ours = {
        name
        for name, field in ServeConfig.model_fields.items()
        if field.default != getattr(config, name)
    }
    if unknown := sorted(ours - {"host", "port", "name", "root", "private"}):
        raise StormError(
            f"vLLM has no --{unknown[0].replace('_', '-')}: leave it out, or start vllm serve with options of its own"
        )
    if key := _key(config):
        os.environ["VLLM_API_KEY"] = key
    name = config.name or Path(checkpoint).expanduser().resolve().name
    options = ["--model", checkpoint, "--served-model-name", name]
    options += ["--host", config.host, "--port", str(config.port)]
    if config.root is not None:
        options += ["--allowed-local-media-path", str(config.root.resolve())]
    if not config.private:  # vLLM does not look at addresses: then it fetches from none
        options += ["--allowed-media-domains", "none.invalid"]
    # as a module: what `vllm serve` runs, and surely of this environment
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options])


def _key(config: ServeConfig) -> str | None:
    key = os.environ.get(KEY) or None
    if key is None and config.host not in LOOPBACK:
        raise StormError(f"--host {config.host} lets other machines in: set {KEY} to a secret key")
    return key
