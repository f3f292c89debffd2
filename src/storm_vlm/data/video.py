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
from errno import ENOSPC
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import SideData
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from storm_vlm.data.atomic_write import WriteError, in_one_step
from storm_vlm.data.decode import (
    EPSILON,
    PlayedSource,
    UntimedPackets,
    VideoError,
    VideoSource,
    unreadable,
)
from storm_vlm.errors import InputError

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

_DEFAULT_FPS = 24.0  # what transformers assumes for frames that come without metadata
MAX_PIXELS = 1920 * 1080  # of a frame; larger ones are scaled down. Qwen2.5-VL sees at most 602,112


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
    of the video, not start there. ``max_side`` bounds the longer side in pixels; beyond 1920 x 1080
    pixels a frame is scaled down in any case. Memory holds the sampled frames only. Raises :class:`VideoError`.
    """
    path = os.fspath(path)
    if num_frames < 1 or (max_side is not None and max_side < 1):
        raise InputError(f"num_frames and max_side must be at least 1: {num_frames}, {max_side}")
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
    """The frames on screen at the given ascending times, in seconds.

    Raises :class:`VideoError`, also where the video ends before the last of them.
    """

    def shown(source: VideoSource) -> list[float]:
        if times[0] < times[-1]:
            source.times(times[-1], times[-1])  # raises; a window may reach past the end
        starts = source.times(times[0], times[-1])
        return [starts[max(bisect_right(starts, time + EPSILON) - 1, 0)] for time in times]

    return _read(os.fspath(path), shown, max_side)


def frame_times(path: str | os.PathLike[str]) -> list[float]:
    """When each frame comes on screen, in seconds, ascending. Raises :class:`VideoError`."""
    path = os.fspath(path)
    try:
        try:
            with VideoSource(path) as source:
                return source.times(0, float("inf"))
        except UntimedPackets:
            with PlayedSource(path) as source:
                return source.times(0, float("inf"))
    except (FFmpegError, OSError, UntimedPackets) as error:
        raise unreadable(path, error) from error


def require_proportions(path: str, height: int, width: int) -> None:
    """Raise :class:`VideoError` for a clip thinner than Qwen2.5-VL's processor takes."""
    if max(height, width) > 200 * min(height, width):
        raise VideoError(
            f"{path}: {width} x {height} pixels are more than 200 to 1; crop or pad it"
        )


def video_shape(path: str | os.PathLike[str], start: float | None = None) -> tuple[int, int, int]:
    """Frames (0: not said), height and width in pixels, as the file's header has them.

    Raises :class:`VideoError`, also where a window from ``start`` would begin behind the video's end.
    """
    path = os.fspath(path)
    try:
        with VideoSource(path) as source:
            shape = source.stream.frames, source.stream.height, source.stream.width
            end = source.promised_end()
    except (FFmpegError, OSError) as error:
        raise unreadable(path, error) from error
    require_proportions(path, *shape[1:])
    if end and (start or 0) > end + 1:  # a header is only roughly right
        raise VideoError(
            f"{path}: the window starts at {start} s but the video ends at {end:.2f} s; correct the row's start"
        )
    return shape


def _read(
    path: str, choose: Callable[[VideoSource], list[float]], max_side: int | None = None
) -> Clip:
    """The frames that start at the chosen times."""
    try:
        try:
            return _sample(VideoSource(path), choose, max_side)
        except UntimedPackets:
            return _sample(PlayedSource(path), choose, max_side)
    except (FFmpegError, OSError, UntimedPackets) as error:
        raise unreadable(path, error) from error


def _sample(
    source: VideoSource, choose: Callable[[VideoSource], list[float]], max_side: int | None
) -> Clip:
    with source:
        times = choose(source)
        frames = source.frames_at(times)
        first = next(frames)
        longest, area = max(first.width, first.height), first.width * first.height
        scale = min(1.0, (max_side or longest) / longest, (MAX_PIXELS / area) ** 0.5)
        width, height = (max(1, round(n * scale)) for n in (first.width, first.height))
        convert = VideoReformatter().reformat
        # A frame that was asked for its side data is not freed before the next garbage collection, so a tiny one is.
        tiny = convert(first, 2, 2, "rgb24", interpolation="POINT", threads=1)
        matrix = tiny.side_data.get("DISPLAYMATRIX")
        shape = _upright(np.empty((height, width, 3), np.uint8), matrix).shape
        pixels = np.empty((len(times), *shape), np.uint8)
        for index, frame in enumerate(chain([first], frames)):
            # No name holds the converted frame, so that the next one takes its memory.
            pixels[index] = _upright(
                convert(frame, width, height, "rgb24", threads=1).to_ndarray(), matrix
            )
    return Clip(pixels, np.array(times), source.path)


def _upright(pixels: np.ndarray, matrix: SideData | None) -> np.ndarray:
    """Pixels (H, W, 3) turned and mirrored as a display matrix has it: (x, y) -> (ax + cy, bx + dy)."""
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


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
        if getattr(error, "errno", None) == ENOSPC:
            raise WriteError(path, "no space left on device") from error
        raise VideoError(f"{path}: cannot write {codec} video ({error})") from error


def _spread(times: list[float], count: int, low: float, high: float) -> list[float]:
    """Start times of the frames on screen at ``count`` even instants; all if there are no more."""
    if len(times) <= count:
        return times
    first, last = max(low, times[0]), min(high, times[-1])
    instants = np.linspace(first, last, count) if count > 1 else [(first + last) / 2]
    return [times[max(bisect_right(times, t + EPSILON) - 1, 0)] for t in instants]
