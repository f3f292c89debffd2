"""The client of an OpenAI-compatible endpoint: the teacher's, and that of models to be evaluated."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from storm_vlm.errors import StormError

if TYPE_CHECKING:
    from openai import OpenAI


def connect(url: str | None, key_env: str, retries: int, timeout: float) -> OpenAI:
    """A client for `url` (None: OpenAI's own), with the key of the environment variable `key_env`.

    `retries` of 429, 5xx, timeouts (seconds) and broken connections are its own business. Raises StormError: the
    package is missing, or the key where it is needed.
    """
    try:
        from openai import OpenAI
    except ImportError as error:
        raise StormError(
            "an endpoint needs the openai client: pip install 'storm-vlm[api]'"
        ) from error
    key = os.environ.get(key_env)
    if not key and not url:
        raise StormError(f"no API key: set {key_env}, or name a base_url")
    # Own servers mostly want no key.
    return OpenAI(api_key=key or "none", base_url=url, max_retries=retries, timeout=timeout)
