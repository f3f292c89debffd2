"""Videos are fetched and decoded in processes that can be ended: what hangs, crashes or swells takes none along."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from storm_vlm.data.video import Clip, read_video, video_shape
from storm_vlm.errors import StormError
from storm_vlm.serving.config import ServeConfig
from storm_vlm.serving.source import SourceError, video_file

MEMORY = 2 * 2**30  # bytes that a reader may address beside a clip's frames and its imports
START = 60  # seconds for a reader to get ready
READY = b"ready"  # what it has to import takes longer than many a video
log = logging.getLogger(__name__)


class ClipReaders:
    """`config.readers` processes that read a clip each. `close` ends them."""

    def __init__(self, num_frames: int, config: ServeConfig) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="storm-")
        files = (Path(self._folder.name) / f"video{i}" for i in range(config.readers))
        self._idle = [_Reader(num_frames, config, file) for file in files]
        self._readers = tuple(self._idle)
        self._threads = ThreadPoolExecutor(config.readers)

    async def read(self, url: str) -> Clip:
        """The frames of a `video_url`. Raises SourceError, also for what cannot be decoded within the limits."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, url)

    def _read(self, url: str) -> Clip:
        reader = self._idle.pop()  # there are as many as threads
        try:
            return reader.read(url)
        finally:
            self._idle.append(reader)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for reader in self._readers:
            reader.end()
        self._folder.cleanup()


class _Reader:
    def __init__(self, num_frames: int, config: ServeConfig, scratch: Path) -> None:
        self.num_frames, self.config, self.scratch = num_frames, config, scratch
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        arguments = (other, self.num_frames, self.config, self.scratch)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.is_ready = False

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def read(self, url: str) -> Clip:
        for _ in range(2):  # what ended it the first time may have nothing to do with this video
            try:
                if not self.is_ready:
                    if not self.connection.poll(START):
                        raise TimeoutError
                    self.is_ready = self.connection.recv_bytes() == READY
                self.connection.send(url)
                if self.connection.poll(self.config.read_seconds):
                    return self._receive()
                fault = f"the video took more than {self.config.read_seconds:g} s to read"
            except TimeoutError:
                fault = f"no reader of videos got ready within {START} s; ask again later"
            except (EOFError, OSError):
                fault = "the decoder gave up on the video; convert it to MP4 (H.264)"
            log.warning("a reader of videos is started anew: %s", fault)
            self.end()
            self._begin()
            if "took" in fault:
                break
        raise SourceError(fault)

    def _receive(self) -> Clip:
        """Bytes, no pickle: what decodes a stranger's file is not trusted."""
        head = json.loads(self.connection.recv_bytes(1 << 20))
        if "error" in head:
            raise SourceError(head["error"])
        frames = np.empty(head["shape"], np.uint8)
        self.connection.recv_bytes_into(frames.data.cast("B"))
        return Clip(frames, np.array(head["timestamps"]), "the video")


def _serve(connection: Connection, num_frames: int, config: ServeConfig, scratch: Path) -> None:
    """In the process: one address after another, until the server closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import resource

        # beside what is imported: a server's own script may load much
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        clip = 6 * num_frames * config.max_pixels  # of three bytes each, held twice at most
        most = pages * resource.getpagesize() + MEMORY + clip
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with contextlib.suppress(EOFError, OSError):  # the server has ended
        connection.send_bytes(READY)
        while True:
            head, frames = _outcome(connection.recv(), num_frames, config, scratch)
            connection.send_bytes(json.dumps(head).encode())
            if frames is not None:
                connection.send_bytes(frames.data.cast("B"))


def _outcome(
    url: str, num_frames: int, config: ServeConfig, scratch: Path
) -> tuple[dict[str, Any], np.ndarray | None]:
    try:
        clip = _clip(url, num_frames, config, scratch)
    except StormError as error:
        return {"error": str(error)}, None
    except Exception:
        log.exception("a video that the reader knows no name for")
        return {"error": "the video cannot be read; convert it to MP4 (H.264)"}, None
    frames = np.ascontiguousarray(clip.frames)
    return {"shape": frames.shape, "timestamps": clip.timestamps.tolist()}, frames


def _clip(url: str, num_frames: int, config: ServeConfig, scratch: Path) -> Clip:
    path = scratch
    try:
        path = video_file(url, config, scratch)
        frames, height, width = video_shape(path)
        if height * width > config.max_pixels or frames > config.max_frames:
            raise SourceError(
                f"the video has {width} x {height} pixels and {frames:,} frames; this server takes "
                f"{config.max_pixels:,} pixels and {config.max_frames:,} frames"
            )
        clip = read_video(path, num_frames)
    except StormError as error:
        raise SourceError(str(error).replace(str(path), "the video")) from error
    finally:
        scratch.unlink(missing_ok=True)
    if clip.timestamps[-1] > config.max_seconds:
        raise SourceError(
            f"the video is longer than the {config.max_seconds:g} s that this server takes"
        )
    return clip
