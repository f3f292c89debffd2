"""The frames on screen as the program ``ffmpeg`` has them, in what codecs, containers and structures there are."""

import re
import shlex
import shutil
import subprocess
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from spelled import number, spelled

from storm_vlm.data.video import read_video

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the program ffmpeg")

COUNT, RATE, WIDTH, HEIGHT = 36, 25, 96, 72
H264 = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p -g 9"
BFRAMES = f"{H264} -bf 2 -b_strategy 0"
PYRAMID = (
    "-c:v libx264 -preset veryfast -g 12 -bf 3 -pix_fmt yuv420p "
    "-x264-params b-pyramid=normal:open-gop=1:b-adapt=0:scenecut=0"
)
TWO = f"-filter_complex [0:v]split[a][b];[a]hflip[c] -map [c] -map [b] {BFRAMES} -s:v:0 48x36"
HEVC = "-c:v libx265 -preset ultrafast -x265-params log-level=none:keyint=9:bframes=3:open-gop=1:pools=none"
MPEG4, MPEG2, MPEG1 = (f"-c:v {c} -q:v 2 -g 9 -bf 2" for c in ("mpeg4", "mpeg2video", "mpeg1video"))
XVID = "-c:v libxvid -q:v 2 -g 9 -bf 2"
VP8 = "-c:v libvpx -g 12 -b:v 2M -deadline realtime -cpu-used 8"
VP9 = "-c:v libvpx-vp9 -g 12 -b:v 2M -deadline realtime -cpu-used 8"
ALTREF = "-auto-alt-ref 1 -lag-in-frames 16 -arnr-maxframes 7 -arnr-strength 5 -deadline good -cpu-used 5"
AV1 = "-c:v libsvtav1 -preset 12 -g 12"
UNEVEN = "-vf setpts=N+3*floor(N/5)+floor(N/7) -fps_mode passthrough"
# name of the file -> what ffmpeg writes it with; after a "|", a second call that copies the first one's file
CASES = {
    **{f"h264.{s}": BFRAMES for s in ("mp4", "mov", "mkv", "ts", "flv", "avi", "asf", "mpg")},
    **{f"h264_no_b.{s}": f"{H264} -bf 0" for s in ("avi", "asf", "mpg")},
    **{f"h264_pyramid.{s}": PYRAMID for s in ("mp4", "mkv", "ts", "avi")},
    "h264_interlaced.ts": f"{BFRAMES} -flags +ilme+ildct",
    "h264_refresh.mp4": "-c:v libx264 -x264-params intra-refresh=1:keyint=12 -pix_fmt yuv420p",
    **{f"hevc.{s}": HEVC for s in ("mp4", "mkv", "ts")},
    **{f"mpeg4.{s}": MPEG4 for s in ("mp4", "ts", "avi", "mpg")},
    "mpeg4_no_b.avi": "-c:v mpeg4 -q:v 2 -g 9",
    **{f"xvid.{s}": XVID for s in ("mp4", "avi", "mkv")},
    **{f"mpeg2.{s}": MPEG2 for s in ("vob", "ts", "mkv", "avi")},
    "mpeg2_interlaced.ts": f"{MPEG2} -flags +ilme+ildct",
    **{f"mpeg1.{s}": MPEG1 for s in ("mpg", "avi", "ts")},
    "vp8.webm": VP8,
    "vp8_altref.webm": f"{VP8} {ALTREF}",
    **{f"vp9.{s}": VP9 for s in ("webm", "mp4")},
    "vp9_altref.webm": f"{VP9} {ALTREF}",
    **{f"av1.{s}": AV1 for s in ("mp4", "webm")},
    "theora.ogv": "-c:v libtheora -q:v 9 -g 9",
    "wmv.wmv": "-c:v wmv2 -q:v 2 -g 9",
    "msmpeg4.avi": "-c:v msmpeg4 -q:v 2 -g 9",
    "flv1.flv": "-c:v flv -q:v 2 -g 9",
    **{f"mjpeg.{s}": "-c:v mjpeg -q:v 2" for s in ("avi", "mov")},
    "pictures.gif": "",
    "raw.avi": "-c:v rawvideo -pix_fmt yuv420p",
    "prores.mov": "-c:v prores",
    # structures
    **{f"uneven.{s}": f"{UNEVEN} {BFRAMES}" for s in ("mp4", "mkv", "ts", "asf")},
    "uneven.webm": f"{UNEVEN} {VP9}",
    "uneven.gif": UNEVEN,
    "fragments.mp4": f"{BFRAMES} -movflags frag_keyframe+empty_moov",
    "front.mp4": f"{BFRAMES} -movflags faststart",
    "negative.mp4": f"{BFRAMES} -movflags negative_cts_offsets",
    "live.webm": f"{VP9} -live 1",
    "live.mkv": f"{BFRAMES} -live 1",
    **{f"late.{s}": f"{BFRAMES} -output_ts_offset 5.3" for s in ("mp4", "ts", "mpg")},
    "hours.ts": f"{BFRAMES} -output_ts_offset 36000",
    "around.ts": f"{BFRAMES} -output_ts_offset 95442.3",  # the clock has 33 bits
    **{f"cut.{s}": f"{BFRAMES} | -ss 0.5 -i {{}} -c copy" for s in ("mp4", "mkv", "ts", "mov")},
    "cut_pyramid.mp4": f"{PYRAMID} | -ss 0.7 -i {{}} -c copy",
    "reordered_no_more.mp4": f"{BFRAMES} -f avi | -i {{}} -c copy",
    "unpacked.mp4": f"{XVID} -f avi | -i {{}} -c copy -bsf:v mpeg4_unpack_bframes",
    "one.avi": f"{BFRAMES} -frames:v 1",
    "two.mpg": f"{MPEG2} -frames:v 2",
    "sound.avi": f"-f lavfi -i sine=d=3 {XVID} -c:a mp2",
    "sound.ts": f"-f lavfi -i sine=d=3 {BFRAMES} -c:a mp2",
    "sound.mpg": f"-f lavfi -i sine=d=3 {MPEG2} -c:a mp2",
    "sound_first.mkv": f"{BFRAMES} | -f lavfi -i sine=d=3 -itsoffset 0.73 -i {{}} -c:v copy -c:a aac",
    "sound_first.mp4": f"{BFRAMES} | -f lavfi -i sine=d=3 -itsoffset 0.73 -i {{}} -c:v copy -c:a aac",
    "two_default.mkv": f"{TWO} -disposition:v:0 0 -disposition:v:1 default",
    "two_small_default.mkv": f"{TWO} -disposition:v:0 default -disposition:v:1 0",
    "two.ts": TWO,
    "turned.mp4": f"{BFRAMES} | -i {{}} -c copy -metadata:s:v rotate=90",
    "12:30 %03d [x] é.mp4": BFRAMES,
}
JOINED = {  # files one after the other
    "twice.ts": (BFRAMES, BFRAMES),
    "another.ts": (BFRAMES, f"-vf reverse {BFRAMES} -output_ts_offset 0.3"),
    "hour.ts": (BFRAMES, f"-vf reverse {BFRAMES} -output_ts_offset 3600"),
    "mpeg2.ts": (MPEG2, f"-vf reverse {MPEG2}"),
    "twice.mpg": (MPEG2, f"-vf reverse {MPEG2}"),
}


def ffmpeg(arguments: str, *outputs: str | Path) -> subprocess.CompletedProcess:
    command = ["ffmpeg", "-hide_banner", "-nostdin", "-y", *shlex.split(arguments)]
    run = subprocess.run([*command, *map(str, outputs)], capture_output=True)
    if b"Unknown encoder" in run.stderr:
        pytest.skip("this ffmpeg lacks the encoder")
    run.check_returncode()
    return run


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "raw"
    path.write_bytes(spelled(COUNT, HEIGHT, WIDTH).tobytes())
    return path


def write(path: Path, raw: Path, arguments: str) -> Path:
    first, _, second = arguments.partition(" | ")
    source = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {RATE} -i {raw}"
    if not second:
        ffmpeg(f"{source} {first} -threads 1", f"file:{path}")
        return path
    between = path.with_name("between.mkv" if "-f avi" not in first else "between.avi")
    ffmpeg(f"{source} {first} -threads 1", between)
    ffmpeg(second.replace("{}", str(between)), f"file:{path}")
    return path


def shown_by_ffmpeg(path: Path, clock_jumps: bool) -> tuple[list[float], list[int]]:
    """Times from the start of the file and numbers of all frames."""
    run = ffmpeg(
        f"{'' if clock_jumps else '-copyts'} -i 'file:{path}' -an -vf showinfo -fps_mode passthrough "
        "-f rawvideo -pix_fmt rgb24",
        "-",
    )
    text = run.stderr.decode()
    start = 0.0 if clock_jumps else float((re.findall(r"start: ([\d.]+)", text) or [0])[0])
    lines = [line for line in text.splitlines() if " pts_time:" in line]
    tick = Fraction(re.findall(r"config in time_base: ([\d/]+)", text)[0])
    ticks = [int(re.findall(r" pts: *(-?\d+)", line)[0]) for line in lines]
    times = [float(time * tick) - start for time in ticks]
    size = lines[0].split(" s:")[1].split()[0].split("x")
    frames = np.frombuffer(run.stdout, np.uint8).reshape(len(times), int(size[1]), int(size[0]), 3)
    return times, [number(frame) for frame in frames]


def compare(path: Path, clock_jumps: bool = False) -> None:
    times, numbers = shown_by_ffmpeg(path, clock_jumps)
    whole = read_video(path, 500)
    assert [number(frame) for frame in whole.frames] == numbers
    assert all(np.diff(whole.timestamps) > 0)
    if all(np.diff(times) > 0):  # ffmpeg's are not, where a container stores too little
        tolerance = 1.01 / RATE if path.suffix == ".avi" else 2e-3  # it stores decoding times
        np.testing.assert_allclose(whole.timestamps, times, atol=tolerance)
    times = whole.timestamps.tolist()
    for start, end, count in ((0.31, 0.93, 5), (0.9, None, 3), (None, 0.5, 100), (0.57, 0.58, 1)):
        if times[-1] <= (start or 0):
            continue
        low, high = start or 0.0, np.inf if end is None else end
        clip = read_video(path, count, start, end)
        first = max(bisect_right(times, low + 1e-5) - 1, 0)
        last = max(bisect_right(times, high + 1e-5), first + 1)
        indices = list(range(first, last))
        if len(indices) > count:
            low, high = max(low, times[first]), min(high, times[last - 1])
            instants = np.linspace(low, high, count) if count > 1 else [(low + high) / 2]
            indices = [bisect_right(times, instant + 1e-5) - 1 for instant in instants]
        assert [number(frame) for frame in clip.frames] == [numbers[i] for i in indices]


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_ffmpeg(tmp_path, raw, name):
    compare(write(tmp_path / name, raw, CASES[name]), clock_jumps=name.startswith("around"))


def test_frames_of_a_recording_that_begins_midway_are_those_of_ffmpeg(tmp_path, raw):
    for name, arguments in (
        ("a.ts", BFRAMES),
        ("b.ts", PYRAMID),
        ("c.ts", MPEG2),
    ):
        path = write(tmp_path / name, raw, arguments)
        content = path.read_bytes()
        path.write_bytes(content[len(content) // 5 // 188 * 188 :])
        compare(path)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).with_name("videos").iterdir()), ids=lambda path: path.name
)
def test_frames_of_files_in_the_wild_are_those_of_ffmpeg(path):
    compare(path)


@pytest.mark.parametrize("name", JOINED)
def test_frames_of_joined_recordings_are_those_of_ffmpeg(tmp_path, raw, name):
    parts = [write(tmp_path / f"{i}_{name}", raw, part) for i, part in enumerate(JOINED[name])]
    path = tmp_path / name
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    compare(path, clock_jumps=True)
