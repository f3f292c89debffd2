"""What reading frames costs: this project's reader beside torchcodec and decord, where they are installed.

The clips are written here, H.264 with B-frames, each frame with its own number in it, so that all readers can be seen
to give the same ones. Every reader works on one thread, in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream

from storm_vlm.data.atomic_write import write_json
from storm_vlm.data.video import read_video
from storm_vlm.lab.bench.peak import peak_mib
from storm_vlm.versions import commit, versions

RATE, SECONDS, BITS = 30, 10, 16  # frames a second; of what is encoded; of a frame's number
Sampled = tuple[np.ndarray, np.ndarray]  # frames (T, H, W, 3), timestamps (T,)


@dataclass(frozen=True)
class Size:
    """A clip of so many pixels, the encoded seconds shown `repeats` times."""

    width: int
    height: int
    repeats: int = 1


SIZES = {
    "360p": Size(640, 360),
    "720p": Size(1280, 720),
    "2160p": Size(3840, 2160),
    "1080p, 10 minutes": Size(1920, 1080, 60),
}


@dataclass(frozen=True)
class ReadCost:
    """Of one clip: CPU seconds (the least of all rounds), and MiB at most beyond what the reader's import takes."""

    cpu_seconds: float
    peak_mib: float


def bench_read(
    sizes: list[str], num_frames: int, rounds: int, results: Path | None = None
) -> dict[str, Any]:
    """`ReadCost` by size and reader, ratios of ours to theirs, and whether all gave the same frames."""
    found, readers = {}, {name: _version(name) for name in READERS}
    with TemporaryDirectory() as name:
        path = Path(name) / "clip.mp4"
        for size in sizes:
            _write(path, SIZES[size])
            costs, shown = {}, {}
            for reader in (name for name, release in readers.items() if release):
                # Others are asked for the frames that ours chose.
                times = shown["storm"][0] if shown else None
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    arguments = str(path), reader, num_frames, rounds, times
                    costs[reader], shown[reader] = pool.submit(_measure, *arguments).result()
            found[size] = {
                **costs,
                "ratios": {
                    reader: costs["storm"].cpu_seconds / cost.cpu_seconds
                    for reader, cost in costs.items()
                    if reader != "storm"
                },
                "same_frames": all(of == shown["storm"] for of in shown.values()),
            }
    report = {
        "commit": commit(),
        "versions": {**versions(), **{n: v for n, v in readers.items() if n != "storm"}},
        "frames": num_frames,
        "sizes": found,
    }
    if results is not None:
        write_json(results, report)
    return report


def _measure(
    path: str, reader: str, num_frames: int, rounds: int, times: list[float] | None
) -> tuple[ReadCost, tuple[list[float], list[int]]]:
    read, seconds, sampled = READERS[reader](), [], None
    imported = peak_mib()
    for _ in range(rounds):
        sampled = None  # two clips are never held
        began = time.process_time()
        sampled = read(path, num_frames, np.array(times or []))
        seconds.append(time.process_time() - began)
    assert sampled is not None
    peak = peak_mib() - imported
    frames, timestamps = sampled
    numbers = [_number(frame) for frame in frames]
    return ReadCost(min(seconds), peak), (timestamps.round(4).tolist(), numbers)


def _storm() -> Callable[..., Sampled]:
    def read(path: str, num_frames: int, _: np.ndarray) -> Sampled:
        clip = read_video(path, num_frames)
        return clip.frames, clip.timestamps

    return read


def _torchcodec() -> Callable[..., Sampled]:
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    def read(path: str, _: int, times: np.ndarray) -> Sampled:
        decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
        batch = decoder.get_frames_played_at((times + 0.1 / RATE).tolist())
        return batch.data.numpy(), batch.pts_seconds.numpy()

    return read


def _decord() -> Callable[..., Sampled]:
    from decord import VideoReader  # type: ignore[import-not-found]

    def read(path: str, _: int, times: np.ndarray) -> Sampled:
        indices = (times * RATE).round().astype(int)
        reader = VideoReader(path, num_threads=1)
        starts = reader.get_frame_timestamp(indices)[:, 0]
        return reader.get_batch(indices).asnumpy(), starts.astype(float)

    return read


READERS = {"storm": _storm, "torchcodec": _torchcodec, "decord": _decord}


def _version(reader: str) -> str:
    """Of its package; empty where it is not installed."""
    try:
        return version("storm-vlm" if reader == "storm" else reader)
    except PackageNotFoundError:
        return ""


def _write(path: Path, size: Size) -> None:
    """A pan over a rough picture, with a camera's noise, as x264 encodes it by default."""
    random, shape = np.random.default_rng(0), (size.height, size.width, 3)
    coarse = random.integers(40, 200, (shape[0] // 8 + 40, shape[1] // 8 + 40, 3), np.uint8)
    picture = coarse.repeat(8, 0).repeat(8, 1)
    noise = random.integers(0, 8, (8, *shape), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
        stream.codec_context.thread_count = 1
        packets = []
        for index in range(RATE * SECONDS):
            pan = picture[index // 2 : index // 2 + shape[0], index : index + shape[1]]
            frame = av.VideoFrame.from_ndarray(_numbered(pan + noise[index % 8], index))
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            packets += stream.encode(frame)
        packets += stream.encode()
        whole = [(bytes(p), p.pts, p.dts, p.is_keyframe, p.time_base) for p in packets]
        for repeat in range(size.repeats):
            for content, pts, dts, is_keyframe, tick in whole:
                packet = av.Packet(content)
                shift = round(repeat * SECONDS / tick)
                packet.pts, packet.dts, packet.time_base = pts + shift, dts + shift, tick
                packet.is_keyframe, packet.stream = is_keyframe, stream
                container.mux(packet)


def _numbered(frame: np.ndarray, number: int) -> np.ndarray:
    """With the number's bits as white and black bars along the top."""
    bits = number >> np.arange(BITS) & 1
    frame[: len(frame) // BITS] = (255 * bits).repeat(frame.shape[1] // BITS)[None, :, None]
    return frame


def _number(frame: np.ndarray) -> int:
    bars = frame[: len(frame) // BITS].mean((0, 2)).reshape(BITS, -1).mean(1) > 128
    return int(bars @ (1 << np.arange(BITS)))
