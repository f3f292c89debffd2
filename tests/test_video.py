import gc
import time
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.codec import Codec
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image
from spelled import number
from tiny import tiny_processor

from storm_vlm.data.decode import VideoSource
from storm_vlm.data.video import (
    Clip,
    VideoError,
    read_video,
    video_metadata,
    video_shape,
    write_video,
)


def test_an_address_is_never_opened() -> None:
    for read in (video_shape, lambda name: read_video(name, 2)):
        for name in ("http://127.0.0.1:9/clip.mp4", "file:///clip.mp4"):
            with pytest.raises(VideoError, match="addresses are not read; download"):
                read(name)


def can_encode(codec: str) -> bool:
    try:
        return bool(Codec(codec, "w"))
    except FFmpegError:
        return False


AV1 = next((c for c in ("libsvtav1", "libaom-av1") if can_encode(c)), "libsvtav1")
av1 = pytest.mark.skipif(not can_encode(AV1), reason="this PyAV wheel encodes no AV1")
# suffix, codec, encoder options (short groups of pictures, so that seeking happens)
FORMATS = [
    ("mp4", "libx264", {"g": "7", "bf": "2"}),
    ("mkv", "libx264", {"g": "250"}),
    ("ts", "libx264", {"g": "7", "bf": "2"}),
    ("ts", "mpeg4", {"g": "7", "bf": "2", "flags": "+qscale", "global_quality": "118"}),
    ("webm", "libvpx-vp9", {"g": "7", "deadline": "realtime", "cpu-used": "8"}),
    pytest.param("mp4", AV1, {"g": "7", "preset": "12"}, marks=av1),
    ("avi", "mpeg4", {"g": "7", "flags": "+qscale", "global_quality": "118"}),
]
VIDEOS = Path(__file__).with_name("videos")
SIGNS = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
SIGNS += [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
UNEVEN = [0, 3, 4, 5, 20, 21, 22, 23, 60, 61, 90, 91, 92, 93, 94, 130, 131, 132, 133, 150]


def encode(
    path: Path,
    ticks: list[int],
    rate: int = 10,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    matrix: list[int] | None = None,
    left: int = 255,
) -> str:
    """A video whose frame i appears at ticks[i] / rate s, grey 5 + 4 (i mod 60), white on top."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for index, tick in enumerate(ticks):
            pixels = np.full((size[1], size[0], 3), 5 + 4 * (index % 60), np.uint8)
            pixels[: size[1] // 8] = 255
            pixels[: size[1] // 8, : size[0] // 2] = left
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def shown_indices(clip: Clip) -> list[int]:
    """Which frames of :func:`encode` these are, read from the pixels alone."""
    height = clip.frames.shape[1]
    return [round((float(f[height // 4 :].mean()) - 5) / 4) for f in clip.frames]


def expected_indices(times: list[float], count: int, start: float | None, end: float | None):
    """The rule restated: what is on screen at evenly spread instants; everything if it is few."""
    low, high = start or 0.0, np.inf if end is None else end
    on_screen = [i for i, t in enumerate(times) if t <= high + 1e-6]
    while len(on_screen) > 1 and times[on_screen[1]] <= low + 1e-6:
        on_screen.pop(0)
    if len(on_screen) <= count:
        return on_screen
    low, high = max(low, times[on_screen[0]]), min(high, times[on_screen[-1]])
    instants = np.linspace(low, high, count) if count > 1 else [(low + high) / 2]
    return [bisect_right(times, t + 1e-6) - 1 for t in instants]


@pytest.mark.parametrize(("suffix", "codec", "options"), FORMATS)
def test_the_frames_on_screen_in_every_format(tmp_path, suffix, codec, options):
    path = encode(tmp_path / f"v.{suffix}", list(range(40)), codec=codec, options=options)
    times = [index / 10 for index in range(40)]
    windows = [(None, None), (0.0, 1.0), (1.25, 3.3), (2.0, None), (None, 0.05), (3.95, 9.0)]
    for start, end in windows:
        for count in (1, 2, 7, 16, 100):
            clip = read_video(path, count, start, end)
            indices = expected_indices(times, count, start, end)
            assert shown_indices(clip) == indices, (start, end, count)
            np.testing.assert_allclose(clip.timestamps, [times[i] for i in indices], atol=1e-3)
            assert clip.frames.dtype == np.uint8 and clip.timestamps.dtype == np.float64
            assert clip.frames.shape == (len(indices), 48, 64, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("group", ["4", "250"])
def test_a_variable_frame_rate_is_sampled_by_time(tmp_path, suffix, group):
    path = encode(tmp_path / f"v.{suffix}", UNEVEN, options={"g": group, "bf": "2"})
    times = [tick / 10 for tick in UNEVEN]
    for start, end in ((None, None), (1.0, 9.05), (2.5, 5.0), (9.0, 9.4)):
        for count in (1, 4, 8, 16, 20):
            clip = read_video(path, count, start, end)
            assert shown_indices(clip) == expected_indices(times, count, start, end)
            np.testing.assert_allclose(clip.timestamps, np.array(times)[shown_indices(clip)], 1e-3)
    # 4 of 20 instants by index would be frames 0, 6, 13, 19; by time they are not
    assert shown_indices(read_video(path, 4)) == [0, 7, 14, 19]
    # one frame alone is on screen from 2.3 to 6.0 s
    assert shown_indices(read_video(path, 8, 2.5, 5.0)) == [7]


@pytest.mark.parametrize("rate", [1, 7, 24, 30, 60])
def test_the_processor_gets_the_true_time_between_grids(tmp_path, rate):
    path = encode(tmp_path / "v.mp4", list(range(24)), rate=rate)
    processor: Any = tiny_processor()

    def seconds_per_grid(clip: Clip, **metadata: Any) -> float:
        outputs = processor(
            text=["<|video_pad|>"], videos=[clip.frames], do_sample_frames=False, **metadata
        )
        return float(torch.as_tensor(outputs["second_per_grid_ts"])[0])

    for count in (24, 12, 5):
        clip = read_video(path, count)
        true = 2 * (23 / rate) / (count - 1)
        assert seconds_per_grid(clip, video_metadata=[video_metadata(clip)]) == pytest.approx(true)
        assert clip.fps == pytest.approx(2 / true)
    assert seconds_per_grid(clip) == pytest.approx(2 / 24)  # what happens without metadata


def test_timestamps_count_from_the_start_of_the_file(tmp_path):
    """MPEG-TS starts its clock late; hidden frames of an MP4's edit list are not shown."""
    late = read_video(encode(tmp_path / "v.ts", list(range(20))), 20)
    assert late.timestamps[0] == 0 and shown_indices(late) == list(range(20))
    negative = read_video(encode(tmp_path / "v.mp4", list(range(-5, 15))), 20)
    np.testing.assert_allclose(negative.timestamps, np.arange(15) / 10)
    assert shown_indices(negative) == list(range(5, 20))


@pytest.mark.parametrize("matrix", SIGNS)
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path, matrix):
    """A display matrix sends (x, y) to (ax + cy, bx + dy); the frame is white on top, grey on its left."""
    a, b, c, d = matrix
    entries = [65536 * value for value in (a, b)] + [0] + [65536 * value for value in (c, d)]
    path = encode(tmp_path / "v.mp4", [0, 1], matrix=[*entries, 0, 0, 0, 1 << 30], left=180)
    with av.open(path) as container:
        plain = next(container.decode(video=0)).to_ndarray(format="rgb24")
    frame = read_video(path, 1).frames[0]
    height, width = plain.shape[:2]
    for x, y in ((0, 0), (width - 1, 0), (0, height - 1), (20, 10)):
        left = a * x + c * y + (a + c < 0) * ((width if a else height) - 1)
        top = b * x + d * y + (b + d < 0) * ((width if b else height) - 1)
        assert (frame[top, left] == plain[y, x]).all()
    assert frame.shape[:2] == ((width, height) if b else (height, width))


def test_no_frame_waits_for_the_garbage_collector(tmp_path):
    path = encode(tmp_path / "v.mp4", list(range(4)))
    gc.collect()
    gc.disable()
    try:
        read_video(path, 2)
        left = [f.width for f in gc.get_objects() if type(f) is av.VideoFrame]
    finally:
        gc.enable()
    assert max(left, default=0) <= 2


def test_max_side_shrinks_only(tmp_path):
    path = encode(tmp_path / "v.mp4", list(range(4)), size=(64, 48))
    assert read_video(path, 2, max_side=32).frames.shape == (2, 24, 32, 3)
    assert read_video(path, 2, max_side=640).frames.shape == (2, 48, 64, 3)
    large, small = (read_video(path, 4, max_side=side).frames.astype(float) for side in (64, 32))
    averaged = large.reshape(4, 24, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(averaged - small)[:, 4:].max() <= 4  # rounding aside, the same pictures


def test_a_single_frame_is_a_video(tmp_path):
    for suffix in ("mp4", "mkv"):
        clip = read_video(encode(tmp_path / f"v.{suffix}", [0]), 16)
        assert clip.frames.shape == (1, 48, 64, 3)
        assert clip.timestamps.tolist() == [0] and clip.fps == 24


class CountingSource(VideoSource):
    decoded = 0

    def _decode(self, start, wanted):
        for item in super()._decode(start, wanted):
            self.decoded += 1
            yield item


@pytest.mark.parametrize(("group", "most"), [("10", 18), ("1000", 110)])
def test_no_more_is_decoded_than_the_groups_of_the_wanted_frames(tmp_path, group, most):
    """Nor, of these, the frames that no other needs."""
    path = encode(tmp_path / "v.mp4", list(range(200)), options={"g": group, "bf": "2"})
    with CountingSource(path) as source:
        wanted = [0.0, 5.5, 11.1, 19.9]
        frames = list(source.frames_at([t for t in source.times(0, 99) if round(t, 3) in wanted]))
        assert len(frames) == 4 and source.decoded <= most


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_reading_leaves_no_threads(tmp_path):
    """Each frame's conversion once had threads of its own, hundreds until the garbage was collected."""
    write_video(tmp_path / "clip.mp4", np.zeros((8, 64, 64, 3), np.uint8), 8)
    before = set(Path("/proc/self/task").iterdir())
    gc.disable()
    try:
        for _ in range(3):
            read_video(tmp_path / "clip.mp4", 8)
        assert set(Path("/proc/self/task").iterdir()) <= before
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory as Linux does")
def test_frames_are_freed_as_they_are_read(tmp_path):
    """Each once waited for the garbage collector, with the frame it was decoded to: 12 MB of a 4K one."""
    path, held = tmp_path / "clip.mp4", []
    write_video(path, np.zeros((24, 720, 1280, 3), np.uint8), 8)
    gc.disable()
    try:
        for _ in range(4):
            read_video(path, 24)
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20)
    finally:
        gc.enable()
    assert held[-1] - held[0] < 48  # MiB; 32 of them a time


def test_a_short_clip_is_read_in_milliseconds(tmp_path):
    path = tmp_path / "v.mp4"
    frames = np.full((16, 128, 128, 3), 90, np.uint8)
    for index, frame in enumerate(frames):
        frame[40:60, 6 * index : 6 * index + 20] = (250, 40, 40)  # a square that moves
    write_video(path, frames, 8)
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        read_video(path, 16)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.03  # about 4 ms; not a benchmark, only no accident


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.mp4", b""), ("text.mp4", b"no video " * 99), ("notes.txt", b"no video " * 99)],
)
def test_what_is_no_video_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=name):
        read_video(tmp_path / name, 4)


def test_names_are_read_as_people_type_them(tmp_path, monkeypatch):
    path = encode(tmp_path / "12:30 caf\u00e9.mp4", [0, 1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [path, "12:30 caf\u00e9.mp4", "12:30 cafe\u0301.mp4", "~/12:30 caf\u00e9.mp4"]
    assert [len(read_video(name, 9).frames) for name in names] == [2] * 4
    with pytest.raises(VideoError, match=r"~/gone\.mp4: no such video file"):
        read_video("~/gone.mp4", 4)


def test_a_picture_is_told_apart_from_a_video(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
        for read in (video_shape, lambda path: read_video(path, 2)):
            with pytest.raises(VideoError, match=r"is a picture .*; make a clip of it"):
                read(tmp_path / name)
    Image.new("RGB", (40, 30)).save(tmp_path / "bomb.gif")
    data = (tmp_path / "bomb.gif").read_bytes()
    (tmp_path / "bomb.gif").write_bytes(data[:6] + b"\xff" * 4 + data[10:])  # 65,535 x 65,535
    with pytest.raises(VideoError, match=r"bomb\.gif: cannot be read as a video"):
        read_video(tmp_path / "bomb.gif", 2)


# 100 frames at 25 a second, with B-frames, in containers that do not say when a frame is shown
@pytest.mark.parametrize("path", sorted(VIDEOS.iterdir()), ids=lambda path: path.name)
def test_frames_without_presentation_times(path):
    clip = read_video(path, 500)
    assert [number(frame) for frame in clip.frames] == list(range(100))
    np.testing.assert_allclose(np.diff(clip.timestamps), 0.04, atol=2e-3)
    for start, end, count in ((1.3, 2.7, 16), (3.5, None, 2), (None, 0.4, 50)):
        window = read_video(path, count, start, end)
        shown = np.searchsorted(clip.timestamps, window.timestamps + 1e-4) - 1
        assert [number(frame) for frame in window.frames] == shown.tolist()
        assert (start or 0) - 0.05 < window.timestamps[0] <= (start or 0) + 0.09


def test_joined_recordings_go_on(tmp_path):
    one = Path(encode(tmp_path / "one.ts", list(range(20)), options={"g": "7", "bf": "2"}))
    path = tmp_path / "two.ts"
    path.write_bytes(one.read_bytes() * 2)
    clip = read_video(path, 99)
    assert shown_indices(clip) == [*range(20), *range(20)]
    np.testing.assert_allclose(clip.timestamps, np.arange(40) / 10, atol=1e-3)
    assert shown_indices(read_video(path, 3, 2.5, 2.7)) == [5, 6, 7]
    assert shown_indices(read_video(path, 3, 1.0, 1.2)) == [10, 11, 12]


def test_the_default_track_is_shown(tmp_path):
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for size in (64, 32):
            stream = container.add_stream("libx264", rate=10)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
            streams.append(stream)
        streams[0].disposition, streams[1].disposition = Disposition(0), Disposition.default
        for stream in streams:
            pixels = np.zeros((stream.height, stream.width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        for stream in streams:
            container.mux(stream.encode())
    assert read_video(path, 1).frames.shape == (1, 32, 32, 3)


def test_huge_frames_are_scaled_down(tmp_path, monkeypatch):
    path = encode(tmp_path / "v.mp4", [0, 1], size=(96, 64))
    monkeypatch.setattr("storm_vlm.data.video.MAX_PIXELS", 96 * 64)
    assert read_video(path, 2).frames.shape == (2, 64, 96, 3)
    monkeypatch.setattr("storm_vlm.data.video.MAX_PIXELS", 48 * 32)
    assert read_video(path, 2).frames.shape == (2, 32, 48, 3)


def test_play_lists_are_not_followed(tmp_path):
    encode(tmp_path / "v.ts", list(range(20)))
    play_list = tmp_path / "v.m3u8"
    play_list.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nv.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError, match=r"v\.m3u8"):
        read_video(play_list, 4)


def test_missing_files_folders_and_sound_are_refused(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4: no such video file; check the path"):
        read_video(tmp_path / "gone.mp4", 4)
    with pytest.raises(VideoError, match="it is a folder"):
        read_video(tmp_path, 4)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="holds no video stream"):
        read_video(tmp_path / "sound.mp4", 4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "flv"])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.6])
def test_a_cut_off_file_is_refused_unless_the_window_survives(tmp_path, suffix, share):
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    whole = Path(encode(tmp_path / f"whole.{suffix}", list(range(50)), codec=codec))
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with pytest.raises(VideoError, match=r"cut\."):
        read_video(cut, 8)
    if share == 0.6 and suffix != "mp4":  # without its index, at the end, an MP4 is lost
        assert shown_indices(read_video(cut, 4, 0, 0.55)) == [0, 1, 3, 5]


def test_a_cut_off_mp4_with_its_index_in_front(tmp_path):
    fast = {"movflags": "faststart"}
    whole = Path(encode(tmp_path / "whole.mp4", list(range(50)), container_options=fast))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.8)])
    with pytest.raises(VideoError, match=r"cut\.mp4: cut off after .* of 5\.00 s"):
        read_video(cut, 8)
    assert shown_indices(read_video(cut, 4, 0, 0.55)) == [0, 1, 3, 5]


def test_pictures_that_do_not_decode_are_refused(tmp_path):
    fast = {"movflags": "faststart"}
    path = Path(encode(tmp_path / "v.mp4", list(range(30)), container_options=fast))
    content = path.read_bytes()
    begin = content.index(b"mdat") + 4
    path.write_bytes(content[:begin] + bytes(len(content) - begin))
    with pytest.raises(VideoError, match=r"v\.mp4"):
        read_video(path, 8)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_damaged_bytes_give_frames_or_a_video_error(tmp_path, suffix):
    whole = Path(encode(tmp_path / f"whole.{suffix}", list(range(20)))).read_bytes()
    random, damaged = np.random.default_rng(0), tmp_path / f"v.{suffix}"
    outcomes = set()
    for _ in range(40):
        content = np.frombuffer(whole, np.uint8).copy()
        content[random.integers(0, len(content), 8)] = random.integers(0, 256, 8)
        damaged.write_bytes(content.tobytes())
        try:
            clip = read_video(damaged, 5)
            assert len(clip.frames) == len(clip.timestamps) > 0
            assert (np.diff(clip.timestamps) >= 0).all()
            outcomes.add("frames")
        except VideoError as error:
            assert str(damaged) in str(error)
            outcomes.add("error")
    assert outcomes == {"frames", "error"}


def test_windows_that_make_no_sense_are_refused(tmp_path):
    path = encode(tmp_path / "v.mp4", list(range(20)))
    for start, end in ((1.0, 1.0), (1.0, 0.5), (-1.0, 1.0), (None, 0.0), (float("nan"), None)):
        with pytest.raises(VideoError, match="start"):
            read_video(path, 4, start, end)
    for start in (2.5, 1.7e18):  # nanoseconds, that is
        with pytest.raises(VideoError, match=r"starts at .* s but the video ends at 2\.00 s"):
            read_video(path, 4, start)
    with pytest.raises(ValueError, match="at least 1"):
        read_video(path, 0)


@pytest.mark.parametrize("fps", [1, 8, 29.97, 30000 / 1001])
def test_written_frames_come_back_at_their_times(tmp_path, fps):
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    frames[:] = (np.arange(9) * 25)[:, None, None, None]
    write_video(tmp_path / "v.mp4", frames, fps)
    clip = read_video(tmp_path / "v.mp4", 9)
    assert np.abs(clip.frames.astype(int) - frames).max() <= 3
    np.testing.assert_allclose(clip.timestamps, np.arange(9) / fps, atol=1e-4)


def test_full_colour_resolution_keeps_single_pixels(tmp_path):
    """Red single-pixel stripes on blue: halved colour resolution mixes them."""
    frames = np.zeros((3, 33, 47, 3), np.uint8)
    frames[..., 2] = 200
    frames[:, :, ::2] = (200, 0, 0)
    write_video(tmp_path / "full.mp4", frames, 8, crf=1, pixel_format="yuv444p")
    assert np.abs(read_video(tmp_path / "full.mp4", 3).frames.astype(int) - frames).max() <= 12
    write_video(tmp_path / "half.mp4", frames[:, :32, :46], 8, crf=1)
    half = read_video(tmp_path / "half.mp4", 3).frames.astype(int)
    assert np.abs(half - frames[:, :32, :46]).max() > 50


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "v.mp4"
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    write_video(path, frames, 8)
    before = path.read_bytes()
    for wrong, message in (
        (frames[0], "uint8"),
        (frames.astype(np.float32), "uint8"),
        (frames[:0], "T > 0"),
        (frames[:, 1:], "even sides"),
    ):
        with pytest.raises(VideoError, match=message):
            write_video(path, wrong, 8)
    for codec in ("no-such-codec", "aac"):
        with pytest.raises(VideoError, match=codec):
            write_video(path, frames, 8, codec=codec)
    with pytest.raises(VideoError, match="cannot write"):
        write_video(path / "v.mp4", frames, 8)  # its folder is a file
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["v.mp4"]
