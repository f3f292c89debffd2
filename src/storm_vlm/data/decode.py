"""Which frame of a file is on screen when, and decoding just those frames (PyAV, one thread)."""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Self

import av
from av.error import FFmpegError
from av.stream import Disposition

from storm_vlm.errors import StormError

# Containers of real footage only. FFmpeg would otherwise render .txt files as teletype pictures
# and follow play lists (m3u8, ffconcat) to other files of the machine.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
EPSILON = 1e-5  # seconds; absorbs rounding of time bases, far below any frame interval


class VideoError(StormError, ValueError):
    """A video that cannot be read as asked; the message names the file and the mend."""


class VideoSource:
    """One open file: what it shows when, and the frames themselves, two held at a time."""

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):  # FFmpeg would open addresses, too
            mend = "it is a folder, name a file in it" if os.path.isdir(path) else "check the path"
            raise VideoError(f"{path}: no such video file; {mend}")
        self.path = path
        self.keyframes: list[float] = []
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def _open(self) -> None:
        self.container = av.open(
            self.path, options={"format_whitelist": _FORMATS}, metadata_errors="ignore"
        )
        cover = Disposition.attached_pic
        streams = [s for s in self.container.streams.video if not s.disposition & cover]
        if not streams:
            self.container.close()
            raise VideoError(f"{self.path}: holds no video stream; give the file with the pictures")
        self.stream = streams[0]
        if self.stream.codec_context is None:
            self.container.close()
            raise VideoError(f"{self.path}: in a codec unknown to PyAV; convert it to H.264")
        # Clips are read side by side by data workers; threads within one only get in their way.
        self.stream.codec_context.thread_count = 1
        self.tick = self.stream.time_base or Fraction(1, av.time_base)
        self.origin = Fraction(self.container.start_time or 0, av.time_base)

    def times(self, low: float, high: float) -> list[float]:
        """Start times of the frames on screen during [low, high], from packets alone (no decode).

        Notes the keyframes there. Raises if the file ends before what its header promises.
        """
        times, shown_until = self._scan(low, high)
        if not self.keyframes or self.keyframes[0] > low + EPSILON:
            times, shown_until = self._scan(None, high)  # the seek led past the group of ``low``
        if not times:
            raise VideoError(f"{self.path}: holds no readable frame; copy or re-encode it again")
        longest = max((after - before for before, after in pairwise(times)), default=0.0)
        promised = self._promised_end()  # only roughly right in many a good file, hence the slack
        if min(high, promised) > shown_until + 2 * longest + 0.5:
            raise VideoError(
                f"{self.path}: cut off after {shown_until:.2f} of {promised:.2f} s; copy the file "
                "again, or end the window earlier"
            )
        if low > shown_until + EPSILON:
            raise VideoError(
                f"{self.path}: the window starts at {low} s but the video ends at "
                f"{shown_until:.2f} s; correct the row's start"
            )
        first = max(bisect_right(times, low + EPSILON) - 1, 0)
        return times[first : max(bisect_right(times, high + EPSILON), first + 1)]

    def frames_at(self, wanted: list[float]) -> Iterator[av.VideoFrame]:
        """The frame on screen at each of the ascending times.

        Decodes on from the last frame unless a keyframe lies between it and the next wanted one:
        reading straight through or seeking, whichever is less work.
        """
        frames: Iterator[tuple[float, av.VideoFrame]] = iter(())
        shown = ahead = None
        for time in wanted:
            index = bisect_right(self.keyframes, time + EPSILON) - 1
            passed = -1.0 if shown is None else (ahead or shown)[0]
            if shown is None or (index >= 0 and self.keyframes[index] > passed + EPSILON):
                # An index by decoding time may lead past the frame: then start further back.
                for start in [*reversed(self.keyframes[max(index - 1, 0) : index + 1]), None]:
                    frames = self._decode(start)
                    shown = ahead = next(frames, None)
                    if shown is not None and shown[0] <= time + EPSILON:
                        break
            while ahead is not None and ahead[0] <= time + EPSILON:
                shown, ahead = ahead, next(frames, None)
            if shown is None or (ahead is None and shown[0] < time - EPSILON):
                raise VideoError(
                    f"{self.path}: the frame at {time:.2f} s cannot be decoded; the file is "
                    "damaged, copy or re-encode it again"
                )
            yield shown[1]

    def _packets(self, time: float | None) -> Iterator[av.Packet]:
        """Whole packets from the last keyframe at or before ``time``; None: from the beginning."""
        if time is None or not self._seek(time):
            self.container.close()
            self._open()
        try:
            yield from (p for p in self.container.demux(self.stream) if not p.is_corrupt)
        except IndexError as error:  # PyAV has no place for a stream that begins midway
            raise VideoError(
                f"{self.path}: a stream begins midway in the file; convert it to MP4"
            ) from error

    def _seek(self, time: float) -> bool:
        try:
            self.container.seek(round((time + self.origin) / self.tick), stream=self.stream)
        except FFmpegError:
            return False  # no index, or nothing before ``time``
        return True

    def _scan(self, low: float | None, high: float) -> tuple[list[float], float]:
        """Frame times from ``low`` to just past ``high``, and when the last leaves the screen."""
        times: set[float] = set()
        keyframes: set[float] = set()
        shown_until = 0.0
        usual = 1 / self.stream.average_rate if self.stream.average_rate else 0
        for packet in self._packets(low):
            time = self._time(packet)
            if time is None:
                continue
            if packet.is_keyframe:
                keyframes.add(time)
            if packet.is_discard:  # an edit list hides it, though others may be decoded from it
                continue
            times.add(time)
            shown_until = max(
                shown_until, time + float((packet.duration or 0) * self.tick or usual)
            )
            if packet.dts is not None and packet.dts * self.tick - self.origin > high:
                shown_until = float("inf")
                break
        self.keyframes = sorted(keyframes)
        return sorted(times), shown_until

    def _decode(self, start: float | None) -> Iterator[tuple[float, av.VideoFrame]]:
        latest = float("-inf")
        clean = start is None
        for packet in self._packets(start):
            clean = clean or packet.is_keyframe  # some containers seek into the middle of a group
            for frame in packet.decode() if clean else ():
                time = self._time(frame)
                latest = latest if time is None else max(latest, time)
                yield latest, frame

    def _time(self, item: av.Packet | av.VideoFrame) -> float | None:
        """Seconds from the start of the file at which the frame appears."""
        ticks = item.dts if item.pts is None else item.pts
        return None if ticks is None else float(ticks * self.tick - self.origin)

    def _promised_end(self) -> float:
        """Where the header says the pictures end, in seconds; 0 if it does not say."""
        if self.stream.duration is not None:
            end = (self.stream.start_time or 0) + self.stream.duration
            return float(end * self.tick - self.origin)
        tag = self.stream.metadata.get("DURATION", "")  # Matroska's
        if clock := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tag):
            hours, minutes, seconds = map(float, clock.groups())
            return hours * 3600 + minutes * 60 + seconds - float(self.origin)
        if self.container.duration is not None and len(self.container.streams) == 1:
            return self.container.duration / av.time_base
        return 0.0
