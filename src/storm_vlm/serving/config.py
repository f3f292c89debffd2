"""What `storm serve` is told: where it listens, and what one request may cost."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from storm_vlm.configs import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeConfig(Settings):
    """One server. The limits hold for every request, whoever sends it."""

    host: str = Field("127.0.0.1", description="Any but this machine's own needs an API key.")
    port: int = Field(8000, ge=0, le=65535, description="0: a free one.")
    name: str = Field("", description="The model's for clients; by default its folder's.")
    root: Path | None = Field(None, description="Folder whose videos clients may name.")
    private: bool = Field(False, description="Fetch from private addresses, too.")
    batch_size: int = Field(8, ge=1, description="Questions answered at a time, at most.")
    queue: int = Field(32, ge=1, description="Requests in hand; more are refused with 429.")
    readers: int = Field(2, ge=1, description="Processes that fetch and decode videos.")
    max_tokens: int = Field(512, ge=1, description="Of an answer.")
    max_mib: float = Field(32, gt=0, description="Of a request, and of a video that is fetched.")
    max_pixels: int = Field(1920 * 1088, ge=1, description="Of a video's picture.")
    max_frames: int = Field(216_000, ge=1, description="Of a video's file.")
    max_seconds: float = Field(3600, gt=0, description="Of a video.")
    read_seconds: float = Field(30, gt=0, description="To fetch and decode a video.")
    request_seconds: float = Field(300, gt=0, description="From a request's head to its answer.")
    drain_seconds: int = Field(30, ge=0, description="For requests in hand when it is stopped.")

    @property
    def max_bytes(self) -> int:
        """`max_mib` in bytes."""
        return int(self.max_mib * 2**20)
