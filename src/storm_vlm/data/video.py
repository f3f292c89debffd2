"""Frames of a video by time, through PyAV alone (its wheels bundle FFmpeg; nothing else is needed).

Every path of the project (training, evaluation, serving, data construction) reads clips here and
hands the processor frames with :func:`video_metadata`, never file names, so that results do not
depend on which decoder libraries a machine happens to have.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import av
import numpy as np
from av.error import FFmpegError
from av.video.stream import VideoStream

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.decode import EPSILON, VideoError, VideoSource

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

__all__ = [
    "Clip",
    "VideoError",
    "read_frames",
    "read_future",
    "read_video",
    "video_metadata",
    "video_shape",
    "write_video",
]

_DEFAULT_FPS = 24.0  # what transformers assumes for frames that come without metadata


@dataclass(frozen=True)
class Clip:
    """Sampled frames.

    ``frames`` uint8 (T, H, W, 3) RGB, upright; ``timestamps`` float64 (T,), seconds from the start
    of the file, never decreasing; ``path`` where the frames come from.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    path: str

    @property
    def fps(self) -> float:
        """Sampled frames per second by the true timestamps; 24 (transformers' rule) if unknown."""
        span = float(self.timestamps[-1] - self.timestamps[0])
        return (len(self.timestamps) - 1) / span if span > 0 else _DEFAULT_FPS


def video_metadata(clip: Clip) -> VideoMetadata:
    """Metadata by which Qwen2.5-VL's processor gives the clip's true ``second_per_grid_ts``.

    One temporal grid is ``temporal_patch_size`` (2) sampled frames, so the processor divides 2 by
    the *sampled* rate. Frames without metadata count as 24 fps whatever their true spacing.
    Pass ``do_sample_frames=False`` with it: the frames are sampled already.
    """
    from transformers.video_utils import VideoMetadata  # brings torch, which reading does not need

    count, height, width = clip.frames.shape[:3]
    return VideoMetadata(
        total_num_frames=count,
        fps=clip.fps,
        width=width,
        height=height,
        duration=count / clip.fps,
        video_backend="pyav",
        frames_indices=list(range(count)),
    )


def read_video(
    path: str | os.PathLike[str],
    num_frames: int,
    start: float | None = None,
    end: float | None = None,
    max_side: int | None = None,
) -> Clip:
    """The frames on screen at ``num_frames`` instants spread evenly over [start, end] seconds.

    Both ends of the window are instants (a single frame: its middle). Time is presentation time,
    so a frame held long in a variable-rate file may be taken more than once; where the window
    shows no more than ``num_frames`` frames, each is taken once. A window may reach past the end
    of the video, not start there. ``max_side`` bounds the longer side in pixels. Memory holds the
    sampled frames only. Raises :class:`VideoError`.
    """
    path = os.fspath(path)
    if num_frames < 1 or (max_side is not None and max_side < 1):
        raise ValueError(f"num_frames and max_side must be at least 1: {num_frames}, {max_side}")
    low, high = start or 0.0, float("inf") if end is None else end
    if not 0 <= low < high:
        raise VideoError(f"{path}: start ({start}) must be at least 0 and less than end ({end})")
    return _read(
        path, lambda source: _spread(source.times(low, high), num_frames, low, high), max_side
    )


def read_future(
    path: str | os.PathLike[str],
    num_frames: int,
    after: float,
    seconds: float = float("inf"),
    max_side: int | None = None,
) -> Clip:
    """``num_frames`` spread evenly over the frames that come on screen later than ``after`` seconds.

    ``seconds``: how far ahead to look. ``max_side`` bounds the longer side in pixels.
    Raises :class:`VideoError`, also where the video ends there.
    """
    path = os.fspath(path)

    def later(source: VideoSource) -> list[float]:
        times = [time for time in source.times(after, after + seconds) if time > after + EPSILON]
        if not times:
            raise VideoError(f"{path}: nothing comes after {after} s; correct the row's end")
        return _spread(times, num_frames, times[0], times[-1])

    return _read(path, later, max_side)


def read_frames(
    path: str | os.PathLike[str], times: Sequence[float], max_side: int | None = None
) -> Clip:
    """The frames on screen at the given ascending times, in seconds. Raises :class:`VideoError`."""

    def shown(source: VideoSource) -> list[float]:
        starts = source.times(times[0], times[-1])
        return [starts[max(bisect_right(starts, time + EPSILON) - 1, 0)] for time in times]

    return _read(os.fspath(path), shown, max_side)


def video_shape(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Frames (0: not said), height and width in pixels, as the file's header has them. Raises :class:`VideoError`."""
    path = os.fspath(path)
    try:
        with VideoSource(path) as source:
            return source.stream.frames, source.stream.height, source.stream.width
    except (FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be opened ({error}); check the path") from error


def _read(
    path: str, choose: Callable[[VideoSource], list[float]], max_side: int | None = None
) -> Clip:
    """The frames that start at the chosen times."""
    frames: list[np.ndarray] = []
    try:
        with VideoSource(path) as source:
            wanted = choose(source)
            width, height = 0, 0
            for frame in source.frames_at(wanted):
                if not frames:
                    longest = max(frame.width, frame.height)
                    scale = min(1.0, (max_side or longest) / longest)
                    width = max(1, round(frame.width * scale))
                    height = max(1, round(frame.height * scale))
                pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
                frames.append(np.rot90(pixels, round(frame.rotation / 90)))
    except (FFmpegError, OSError) as error:
        raise VideoError(
            f"{path}: cannot be read as a video ({error}); convert it to MP4 or drop its row"
        ) from error
    return Clip(np.stack(frames), np.array(wanted), path)


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    fps: float,
    codec: str = "libx264",
    crf: int = 18,
    pixel_format: Literal["yuv420p", "yuv444p"] = "yuv420p",
) -> None:
    """Encode frames uint8 (T, H, W, 3) at a constant rate, in one step (no half-written file).

    The container follows the file's suffix. "yuv420p" plays everywhere and needs even sides;
    "yuv444p" keeps full colour resolution. Raises :class:`VideoError`.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VideoError(
            f"{path}: frames must be uint8 (T, H, W, 3) with T > 0, got {frames.dtype} "
            f"{frames.shape}; convert them first"
        )
    if pixel_format == "yuv420p" and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise VideoError(
            f"{path}: yuv420p needs even sides, got {frames.shape[1:3]}; pad or use yuv444p"
        )
    try:
        with in_one_step(path) as unfinished, av.open(str(unfinished), "w") as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream(codec, rate=rate, options={"crf": str(crf)})
            if not isinstance(stream, VideoStream):
                raise ValueError("not a video codec")
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pixel_format
            stream.codec_context.thread_count = 1  # starting threads costs more than a short clip
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    except (FFmpegError, OSError, ValueError, TypeError) as error:
        raise VideoError(f"{path}: cannot write {codec} video ({error})") from error


def _spread(times: list[float], count: int, low: float, high: float) -> list[float]:
    """Start times of the frames on screen at ``count`` even instants; all if there are no more."""
    if len(times) <= count:
        return times
    first, last = max(low, times[0]), min(high, times[-1])
    instants = np.linspace(first, last, count) if count > 1 else [(first + last) / 2]
    return [times[max(bisect_right(times, t + EPSILON) - 1, 0)] for t in instants]
