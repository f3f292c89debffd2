"""Which frame of a file is on screen when, and decoding just those frames (PyAV, one thread)."""

import os
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Self

import av
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from storm_vlm.errors import StormError

# Containers of real footage only. FFmpeg would otherwise render .txt files as teletype pictures
# and follow play lists (m3u8, ffconcat) to other files of the machine.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
EPSILON = 1e-5  # seconds; absorbs rounding of time bases, far below any frame interval
# Whose decoder leaves out, when told between two packets, a frame that no other one is made from.
_LEAVES_OUT = {"h264", "mpeg4", "mpeg2video", "mpeg1video", "vp8"}


class VideoError(StormError, ValueError):
    """A video that cannot be read as asked; the message names the file and the mend."""


class UntimedPackets(Exception):
    """Packets that do not tell when their frames are shown: read the file as a `PlayedSource`."""


def video_file(path: str) -> str:
    """The file of that name, behind a `~` and in either Unicode form of its accents. Raises VideoError."""
    home = os.path.expanduser(path)
    names = [path, home, *(unicodedata.normalize(form, home) for form in ("NFC", "NFD"))]
    if (name := next(filter(os.path.isfile, names), None)) is not None:
        return name
    if "://" in path:
        raise VideoError(f"{path}: addresses are not read; download the file and give its path")
    mend = "it is a folder, name a file in it" if os.path.isdir(home) else "check the path"
    raise VideoError(f"{path}: no such video file; {mend}")


def unreadable(path: str, error: Exception) -> VideoError:
    """What to tell of a file that FFmpeg cannot read."""
    try:
        with Image.open(video_file(path)) as image:
            fault, mend = f"is a picture ({image.format})", "make a clip of it"
    except (OSError, ValueError, Image.DecompressionBombError):
        fault, mend = f"cannot be read as a video ({error})", "convert it to MP4 or drop its row"
    return VideoError(f"{path}: {fault}; {mend}")


class VideoSource:
    """One open file: what it shows when, and the frames themselves, two held at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.keyframes: list[float] = []
        self._positions: dict[float, int] = {}  # of keyframes, in bytes, for transport streams
        self._file = "file:" + video_file(path)  # "12:30.avi" would be an address to FFmpeg
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def _open(self) -> None:
        self.container = av.open(
            self._file, options={"format_whitelist": _FORMATS}, metadata_errors="ignore"
        )
        self._read = False
        cover = Disposition.attached_pic
        streams = [s for s in self.container.streams.video if not s.disposition & cover]
        if not streams:
            self.container.close()
            raise VideoError(f"{self.path}: holds no video stream; give the file with the pictures")
        self.stream = max(streams, key=_preference)
        if self.stream.codec_context is None:
            self.container.close()
            raise VideoError(f"{self.path}: in a codec unknown to PyAV; convert it to H.264")
        # Clips are read side by side by data workers; threads within one only get in their way.
        self.stream.codec_context.thread_count = 1
        self.tick = self.stream.time_base or Fraction(1, av.time_base)
        self.origin = Fraction(self.container.start_time or 0, av.time_base)
        # tick and origin over one denominator: fractions of every packet would take as long as decoding small frames
        self._step = self.tick.numerator * self.origin.denominator
        self._start = self.origin.numerator * self.tick.denominator
        self._second = self.tick.denominator * self.origin.denominator
        self.stores_decoding_times = self.container.format.name in ("avi", "asf")
        # Only in these may the clock jump, where recordings were joined.
        self.is_joinable = self.container.format.name in ("mpegts", "mpeg")

    def times(self, low: float, high: float) -> list[float]:
        """Start times of the frames on screen during [low, high], from packets alone (no decode).

        Notes the keyframes there. Raises if the file ends before what its header promises.
        """
        times, shown_until = self._timeline(low, high)
        if not times:
            raise VideoError(f"{self.path}: holds no readable frame; copy or re-encode it again")
        longest = max((after - before for before, after in pairwise(times)), default=0.0)
        promised = self.promised_end()  # only roughly right in many a good file, hence the slack
        if min(high, promised) > shown_until + 2 * longest + 0.5:
            raise VideoError(
                f"{self.path}: cut off after {shown_until:.2f} of {promised:.2f} s; copy the file "
                "again, or end the window earlier"
            )
        if low > shown_until + EPSILON:
            raise VideoError(
                f"{self.path}: the window starts at {low} s but the video ends at "
                f"{shown_until:.2f} s; correct the row's start (in seconds)"
            )
        first = max(bisect_right(times, low + EPSILON) - 1, 0)
        return times[first : max(bisect_right(times, high + EPSILON), first + 1)]

    def frames_at(self, wanted: list[float]) -> Iterator[av.VideoFrame]:
        """The frame on screen at each of the ascending times.

        Decodes on from the last frame unless a keyframe lies between it and the next wanted one:
        reading straight through or seeking, whichever is less work.
        """
        frames: Iterator[tuple[float, av.VideoFrame]] = iter(())
        shown, needed = None, set(wanted)
        for time in wanted:
            index = bisect_right(self.keyframes, time + EPSILON) - 1
            if shown is None or (index >= 0 and self.keyframes[index] > shown[0] + EPSILON):
                # An index by decoding time may lead past the frame: then start further back.
                for start in [*reversed(self.keyframes[max(index - 1, 0) : index + 1]), None]:
                    frames = self._decode(start, needed)
                    shown = next(frames, None)
                    if shown is not None and shown[0] <= time + EPSILON:
                        break
            while shown is not None and shown[0] < time - EPSILON:
                shown = next(frames, None)
            if shown is None or shown[0] > time + EPSILON:
                raise UntimedPackets(f"no frame comes from the packet at {time} s")
            yield shown[1]

    def _packets(self, time: float | None) -> Iterator[av.Packet]:
        """Whole packets from the last keyframe at or before ``time``; None: from the beginning."""
        if (time is None and self._read) or (time is not None and not self._seek(time)):
            self.container.close()
            self._open()
        self._read = True
        packets = self.container.demux(self.stream)
        try:
            yield from (p for p in packets if self.is_joinable or not p.is_corrupt)
        except IndexError as error:  # PyAV has no place for a stream that begins midway
            raise VideoError(
                f"{self.path}: a stream begins midway in the file; convert it to MP4"
            ) from error

    def _seek(self, time: float) -> bool:
        try:
            if self.is_joinable:  # the same time may come twice, the same place does not
                position = self._positions.get(time, 0)
                self.container.seek(position, unsupported_byte_offset=True, stream=self.stream)
            else:
                self.container.seek(round((time + self.origin) / self.tick), stream=self.stream)
        except (FFmpegError, OverflowError):
            return False  # no index, or nothing at ``time``
        return True

    def _timeline(self, low: float, high: float) -> tuple[list[float], float]:
        """Ascending frame times around [low, high], and when the last frame leaves the screen."""
        delayed = self.stream.codec_context.has_b_frames
        if self.container.format.name == "mpeg" or (self.stores_decoding_times and delayed):
            raise UntimedPackets("presentation times are not stored, or few")
        times, shown_until = self._scan(None if self.is_joinable else low, high)
        if not self.keyframes or self.keyframes[0] > low + EPSILON:
            times, shown_until = self._scan(None, high)  # the seek led past the group of ``low``
        return times, shown_until

    def _scan(self, low: float | None, high: float) -> tuple[list[float], float]:
        """Frame times from ``low`` to just past ``high``, and when the last leaves the screen."""
        visible: dict[float, bool] = {}  # by time; an edit list hides frames that others need
        self._positions = {}
        shown_until = 0.0
        reordered = not self.stream.codec_context.has_b_frames
        usual = 1 / self.stream.average_rate if self.stream.average_rate else 0
        decoded = None
        for packet in self._packets(low):
            if not packet.size:  # nothing new is shown
                continue
            time = self._time(packet)
            if time is None or time in visible or self._jumps(packet, decoded):
                raise UntimedPackets(f"{packet.pts} after {decoded} ticks")
            visible[time] = not packet.is_discard
            decoded = packet.dts
            reordered = reordered or packet.dts != packet.pts
            if packet.is_keyframe:
                self._positions[time] = packet.pos or 0
            if not visible[time]:
                continue
            duration = float((packet.duration or 0) * self.tick or usual)
            shown_until = max(shown_until, time + duration)
            if (self._seconds(decoded) or 0) > high:
                shown_until = float("inf")
                break
        if not reordered:
            raise UntimedPackets("frames are reordered, packet times are not")
        self.keyframes = sorted(self._positions)
        return sorted(filter(visible.get, visible)), shown_until

    def _jumps(self, packet: av.Packet, decoded: int | None) -> bool:
        """Whether the clock is set anew between a packet decoded at that tick and this one."""
        if packet.dts is None or decoded is None:
            return False
        seconds = (packet.dts - decoded) * self.tick
        return seconds < 0 or (self.is_joinable and seconds > 10)

    def _decode(
        self, start: float | None, wanted: set[float]
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames and their times: at least those that start at the wanted times."""
        latest = float("-inf")
        clean = start is None
        leaves_out = _leaves_out(self.stream.codec_context)
        for packet in self._packets(start):
            clean = clean or packet.is_keyframe  # some containers seek into the middle of a group
            if leaves_out:
                is_needed = not packet.size or self._time(packet) in wanted
                self.stream.codec_context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            for frame in packet.decode() if clean else ():
                time = self._time(frame)
                if time is None or time <= latest:
                    raise UntimedPackets(f"a frame of {time} s after that of {latest} s")
                latest = time
                yield time, frame

    def _time(self, item: av.Packet | av.VideoFrame) -> float | None:
        """When it appears, in seconds from the start of the file."""
        return self._seconds(item.dts if self.stores_decoding_times else item.pts)

    def _seconds(self, ticks: int | None) -> float | None:
        return None if ticks is None else (ticks * self._step - self._start) / self._second

    def promised_end(self) -> float:
        """Where the header says the pictures end, in seconds; 0 if it does not say."""
        if self.is_joinable:
            return 0.0  # FFmpeg computes it from the last packets
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


class PlayedSource(VideoSource):
    """A file that is played through, twice, because its packets do not tell when frames are shown.

    So it is with B-frames in AVI and ASF, with program streams, and where recordings were joined. Frames leave
    the decoder in the order of showing, so the k-th belongs to the k-th of the times in ascending order.
    """

    def _timeline(self, low: float, high: float) -> tuple[list[float], float]:
        stamps = [(frame.pts, frame.dts) for frame in self._frames()]
        preferred = (1, 0) if self.stores_decoding_times else (0, 1)
        columns = [[self._seconds(stamp[i]) for stamp in stamps] for i in preferred]
        times = min(columns, key=_descents)
        known = iter(sorted(time for time in times if time is not None))
        usual = float(1 / (self.stream.average_rate or 25))
        self._clock: list[float] = []
        for time in times:
            latest = self._clock[-1] if self._clock else -usual
            expected = latest + usual
            self._clock.append(expected if time is None else max(next(known), latest + 2 * EPSILON))
        return self._clock, self._clock[-1] + usual if times else 0.0

    def _decode(
        self, start: float | None, wanted: set[float]
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        return zip(self._clock, self._frames(), strict=False)

    def _frames(self) -> Iterator[av.VideoFrame]:
        """All frames, on a clock that goes on where it was set anew."""
        decoded, following, offset = None, 0, 0
        for packet in self._packets(None):
            if packet.dts is not None:
                if self.is_joinable and self._jumps(packet, decoded):
                    offset = following - packet.dts
                decoded = packet.dts
                packet.dts += offset
                following = packet.dts + (packet.duration or 0)
            if packet.pts is not None:
                packet.pts += offset
            yield from packet.decode()


def _descents(times: list[float | None]) -> float:
    known = [time for time in times if time is not None]
    return sum(after <= before for before, after in pairwise(known)) if known else float("inf")


def _leaves_out(codec: av.CodecContext) -> bool:
    if codec.name == "hevc":
        # What its own temporal layer does not need, a higher one may: hvcC must tell of one alone (ISO/IEC 14496-15).
        header = codec.extradata or b""
        return len(header) > 22 and header[0] == 1 and header[21] >> 3 & 7 == 1
    return codec.name in _LEAVES_OUT


def _preference(stream: VideoStream) -> int:
    """The program ``ffmpeg``'s, of several video tracks: the default, then the largest picture."""
    if stream.codec_context is None:
        return 0
    default = bool(stream.disposition & Disposition.default)
    return 5_000_000 * default + stream.width * stream.height
