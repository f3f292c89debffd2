"""Which training clips are also evaluation clips, by the name of the file and by what the frames show.

Video-R1's sources (CLEVRER, STAR, PerceptionTest …) overlap with those of MVBench, so the paper's training data
(section 4.2) and benchmarks (section 4.1) must be compared before a figure means anything.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from storm_vlm.data.frame_hash import distances, frame_hashes
from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.thread_pool import thread_pool
from storm_vlm.data.video import VideoError, read_video

# LLaVA-Video names YouTube's files `ytb_ID`, ActivityNet `v_ID`; TempCompass derives `ID_reverse`, `ID_concat_N` and,
# of several numbers, `ID_ID_ID` from its clips.
_PREFIX = re.compile(r"^(?:ytb|v)_(?=.{5})")
_SUFFIX = re.compile(r"(?:_reverse|_concat_\d+)+$")
_SEVERAL = re.compile(r"\d{6,}(?:_\d{6,})+")
# "video_10009" is a clip of CLEVRER and another one of PerceptionTest.
_GENERIC = re.compile(r"(?:(?:video|clip|scene|sample|train|val|test)[_-]?)*\d{0,5}", re.IGNORECASE)
ALIKE = 0.2  # of `distances`; see the tests for what copies and other clips have
SHARE = 0.1  # of one clip's frames that the other must show
SIDE = 256  # pixels that frames are read at
_CHUNK = 512  # training frames compared at a time

Window = tuple[str, float | None, float | None]  #: file, start, end


@dataclass(frozen=True)
class Leak:
    """A training clip and an evaluation clip that are the same, and the rows that ask about them."""

    train: str
    evaluation: str
    train_rows: tuple[str, ...]
    evaluation_rows: tuple[str, ...]
    why: tuple[str, ...]  #: "file", "name", "frames"
    share: float  #: of the frames of one clip that the other shows, the larger of the two
    distance: float | None  #: of the two frames most alike


@dataclass(frozen=True)
class LeakReport:
    """Every leak, and what could not be compared."""

    leaks: tuple[Leak, ...]
    unreadable: dict[str, str]  #: file: why; compared by name alone
    generic: int  #: clips whose name says nothing; compared by frames alone


def names(path: str) -> set[str]:
    """What a video may be called elsewhere: its file's stem without what data sets add; none if that is generic."""
    stem = _PREFIX.sub("", _SUFFIX.sub("", unicodedata.normalize("NFC", Path(path).stem)))
    found = set(stem.split("_")) if _SEVERAL.fullmatch(stem) else {stem}
    return {name for name in found if not _GENERIC.fullmatch(name)}


def find_leaks(
    train: Sequence[Row], evaluation: Sequence[Row], cache: Path, num_frames: int = 32
) -> LeakReport:
    """Compare the clips of two sets of rows.

    By name: see :func:`names`. By frames: ``num_frames`` spread over each clip (0: names only), and at least two, and
    a tenth, of one clip's frames must look like frames of the other. That finds copies that are encoded again,
    resized, darkened, reversed, joined or cut, as long as enough of the longer one's frames fall into the cut (raise
    ``num_frames`` for long videos); not mirrored or cropped ones. Hashes are kept in the folder ``cache``.
    """
    ours, theirs = _rows_by_clip(train), _rows_by_clip(evaluation)
    why: dict[tuple[Window, Window], list[str]] = defaultdict(list)
    called: dict[str, list[Window]] = defaultdict(list)
    for clip in theirs:
        for name in {os.path.realpath(clip[0])} | names(clip[0]):
            called[name].append(clip)
    for clip in ours:
        for reason, known in (("file", {os.path.realpath(clip[0])}), ("name", names(clip[0]))):
            for pair in {(clip, other) for name in known for other in called.get(name, ())}:
                why[pair].append(reason)
    unreadable: dict[str, str] = {}
    alike: dict[tuple[Window, Window], tuple[float, float]] = {}
    if num_frames:
        hashes = _hashes({**ours, **theirs}, Store(cache), num_frames, unreadable)
        alike = _alike(
            {c: hashes[c] for c in ours if c in hashes},
            {c: hashes[c] for c in theirs if c in hashes},
        )
    for pair in alike:
        why[pair].append("frames")
    leaks = tuple(
        Leak(
            a[0], b[0], tuple(ours[a]), tuple(theirs[b]), tuple(reasons), *alike.get((a, b), (0.0, None))
        )
        for (a, b), reasons in why.items()
    )  # fmt: skip
    return LeakReport(leaks, unreadable, sum(not names(clip[0]) for clip in {**ours, **theirs}))


def without_leaks(train: Iterable[Row], comparison: LeakReport) -> list[Row]:
    """The training rows whose clips leak nowhere."""
    leaking = {row for leak in comparison.leaks for row in leak.train_rows}
    return [row for row in train if row.id not in leaking]


def _rows_by_clip(rows: Iterable[Row]) -> dict[Window, list[str]]:
    found: dict[Window, list[str]] = defaultdict(list)
    for row in rows:
        found[row.video, row.start, row.end].append(row.id)
    return dict(found)


def _hashes(
    clips: Iterable[Window], store: Store, num_frames: int, unreadable: dict[str, str]
) -> dict[Window, np.ndarray]:
    """uint8 (T, 64) for every clip that can be read."""

    def hashes(clip: Window) -> np.ndarray | str:
        path, start, end = clip
        try:
            content = store.content(path) if os.path.isfile(path) else ""
            key = key_of(clip=content, window=[start, end], frames=num_frames, side=SIDE)
            if (kept := store.read("frame_hashes", key, load_file, ".safetensors")) is not None:
                return kept["hashes"]
            computed = frame_hashes(read_video(path, num_frames, start, end, SIDE).frames)
        except (VideoError, OSError) as error:
            return str(error)
        with store.place("frame_hashes", key, ".safetensors") as unfinished:
            save_file({"hashes": computed}, unfinished)
        return computed

    by_clip: dict[Window, np.ndarray] = {}
    clips = list(clips)
    with thread_pool() as pool:
        results = tqdm(pool.map(hashes, clips), "clips", len(clips), leave=False)
        for clip, result in zip(clips, results, strict=True):
            if isinstance(result, str):
                unreadable[clip[0]] = result
            else:
                by_clip[clip] = result
    return by_clip


def _alike(
    ours: dict[Window, np.ndarray], theirs: dict[Window, np.ndarray]
) -> dict[tuple[Window, Window], tuple[float, float]]:
    """(share, distance) of the pairs that show the same."""
    if not ours or not theirs:
        return {}
    our_clips, their_clips = list(ours), list(theirs)
    our_frames, their_frames = (
        np.concatenate(list(ours.values())),
        np.concatenate(list(theirs.values())),
    )
    our_owner = np.repeat(np.arange(len(ours)), [len(h) for h in ours.values()])
    their_owner = np.repeat(np.arange(len(theirs)), [len(h) for h in theirs.values()])
    seen: dict[tuple[int, int], tuple[set[int], set[int], list[float]]] = {}
    for i, j, distance in _close(our_frames, their_frames):
        pair = seen.setdefault((int(our_owner[i]), int(their_owner[j])), (set(), set(), []))
        pair[0].add(i)
        pair[1].add(j)
        pair[2].append(distance)
    found: dict[tuple[Window, Window], tuple[float, float]] = {}
    for (i, j), (mine, others, apart) in seen.items():
        a, b = our_clips[i], their_clips[j]
        share = max(len(mine) / len(ours[a]), len(others) / len(theirs[b]))
        enough = min(2, len(ours[a]), len(theirs[b]))
        if share >= SHARE and max(len(mine), len(others)) >= enough:
            found[a, b] = (share, min(apart))
    return found


def _close(ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Pairs of frames that look alike, with their distance."""
    for start in range(0, len(ours), _CHUNK):
        apart = distances(ours[start : start + _CHUNK], theirs)
        for i, j in zip(*(indices.tolist() for indices in np.nonzero(apart <= ALIKE)), strict=True):
            yield start + i, j, float(apart[i, j])
