"""Which training clips are also evaluation clips, by the name of the file and by what the frames show.

Video-R1's sources (CLEVRER, STAR, PerceptionTest …) overlap with those of MVBench, so the paper's training data
(section 4.2) and benchmarks (section 4.1) must be compared before a figure means anything.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from storm_vlm.data.frame_hash import agree, distances, frame_hashes, pictures
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
TRIED = 3  # frames of the other clip that a frame's still parts are held against
_CHUNK = 512  # training frames, and pairs of clips, compared at a time

Window = tuple[str, float | None, float | None]  #: file, start, end
Pair = tuple[Window, Window]  #: of training, of evaluation


@dataclass(frozen=True)
class Likeness:
    """What of two clips is alike: share and distance as in `Leak`, and the frames most alike, by their numbers."""

    share: float
    distance: float
    frames: tuple[tuple[int, int], ...]


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
    look_alikes: tuple[Leak, ...]  #: frames of one kind, but what stands still in them differs
    unreadable: dict[str, str]  #: file: why; compared by name alone
    generic: (
        int  #: clips whose name says nothing, or is another clip's, too; compared by frames alone
    )


def names(path: str) -> set[str]:
    """What a video may be called elsewhere: its file's stem without what data sets add; none if that is generic."""
    stem = _PREFIX.sub("", _SUFFIX.sub("", unicodedata.normalize("NFC", Path(path).stem)))
    found = set(stem.split("_")) if _SEVERAL.fullmatch(stem) else {stem}
    return {name for name in found if not _GENERIC.fullmatch(name)}


def find_leaks(
    train: Iterable[Row], evaluation: Iterable[Row], cache: Path, num_frames: int = 32
) -> LeakReport:
    """Compare the clips of two sets of rows.

    By name: see :func:`names`; a name that several files of one side have says nothing. By frames: ``num_frames``
    spread over each clip (0: names only), and at least two, and a tenth, of one clip's frames must look like frames
    of the other. That finds copies that are encoded again, resized, darkened, reversed, joined or cut, as long as
    enough of the longer one's frames fall into the cut (raise ``num_frames`` for long videos); not mirrored or
    cropped ones. Clips of one kind, such as two puzzles on one board, have such frames, too: unless in half of these
    what stands still agrees, they are look-alikes. Hashes are kept in the folder ``cache``.
    """
    ours, theirs = _rows_by_clip(train), _rows_by_clip(evaluation)
    our_names, their_names = _telling_names(ours), _telling_names(theirs)
    why: dict[Pair, list[str]] = defaultdict(list)
    called: dict[str, list[Window]] = defaultdict(list)
    for clip in theirs:
        for name in {os.path.realpath(clip[0])} | their_names[clip[0]]:
            called[name].append(clip)
    for clip in ours:
        known_as = (("file", {os.path.realpath(clip[0])}), ("name", our_names[clip[0]]))
        for reason, known in known_as:
            for pair in {(clip, other) for name in known for other in called.get(name, ())}:
                why[pair].append(reason)
    unreadable: dict[str, str] = {}
    alike: dict[Pair, tuple[float, float]] = {}
    if num_frames:
        store = Store(cache)
        hashes = _hashes({**ours, **theirs}, store, num_frames, unreadable)
        found = _alike(
            {c: hashes[c] for c in ours if c in hashes},
            {c: hashes[c] for c in theirs if c in hashes},
        )
        for pair, likeness, same in _judged(found, store, num_frames):
            alike[pair] = likeness.share, likeness.distance
            if same:
                why[pair].append("frames")

    def leak(pair: Pair) -> Leak:
        (a, b), how = pair, alike.get(pair, (0.0, None))
        return Leak(a[0], b[0], tuple(ours[a]), tuple(theirs[b]), tuple(why.get(pair, ())), *how)

    return LeakReport(
        tuple(map(leak, why)),
        tuple(leak(pair) for pair in alike if pair not in why),
        unreadable,
        sum(not (our_names | their_names)[clip[0]] for clip in {**ours, **theirs}),
    )


def _telling_names(clips: Iterable[Window]) -> dict[str, set[str]]:
    """`names` of each path; none where several files have the same stem, as `ground_truth.mp4` in many folders."""
    files: dict[str, set[str]] = defaultdict(set)
    for path, _, _ in clips:
        files[Path(path).stem].add(os.path.realpath(path))
    return {path: names(path) if len(files[Path(path).stem]) < 2 else set() for path, _, _ in clips}


def without_leaks(train: Iterable[Row], comparison: LeakReport) -> Iterator[Row]:
    """The training rows whose clips leak nowhere."""
    leaking = {row for leak in comparison.leaks for row in leak.train_rows}
    return (row for row in train if row.id not in leaking)


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
        try:
            return _kept(store, "frame_hashes", clip, num_frames)["hashes"]
        except (VideoError, OSError) as error:
            return str(error)

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


def _kept(store: Store, kind: str, clip: Window, num_frames: int) -> dict[str, np.ndarray]:
    """What `_COMPUTED` of the clip's frames, from the store if it is there. Raises VideoError, OSError."""
    path, start, end = clip
    content = store.content(path) if os.path.isfile(path) else ""
    key = key_of(clip=content, window=[start, end], frames=num_frames, side=SIDE)
    if (kept := store.read(kind, key, load_file, ".safetensors")) is not None:
        return kept
    computed = _COMPUTED[kind](read_video(path, num_frames, start, end, SIDE).frames)
    with store.place(kind, key, ".safetensors") as unfinished:
        save_file(computed, unfinished)
    return computed


_COMPUTED: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "frame_hashes": lambda frames: {"hashes": frame_hashes(frames)},
    "pictures": lambda frames: dict(zip(("small", "still"), pictures(frames), strict=True)),
}


def _alike(
    ours: dict[Window, np.ndarray], theirs: dict[Window, np.ndarray]
) -> Iterator[tuple[Pair, Likeness]]:
    """The pairs that show the same, or things of one kind; in memory are those of one training clip at a time."""
    if not ours or not theirs:
        return
    our_clips, their_clips = list(ours), list(theirs)
    our_frames, their_frames = (np.concatenate(list(side.values())) for side in (ours, theirs))
    our_owner, their_owner = (
        np.repeat(np.arange(len(side)), [len(h) for h in side.values()]) for side in (ours, theirs)
    )
    our_first, their_first = (
        np.concatenate([[0], np.cumsum([len(h) for h in side.values()])]) for side in (ours, theirs)
    )
    close = _close(our_frames, their_frames)
    for i, group in groupby(close, key=lambda match: int(our_owner[match[0]])):
        a, by_clip = our_clips[i], defaultdict[int, list[tuple[float, int, int]]](list)
        for ours_at, theirs_at, distance in group:
            j = int(their_owner[theirs_at])
            place = ours_at - int(our_first[i]), theirs_at - int(their_first[j])
            by_clip[j].append((distance, *place))
        for j, matches in by_clip.items():
            b = their_clips[j]
            mine, others = (len({match[side] for match in matches}) for side in (1, 2))
            share = max(mine / len(ours[a]), others / len(theirs[b]))
            enough = min(2, len(ours[a]), len(theirs[b]))
            if share >= SHARE and max(mine, others) >= enough:
                yield (a, b), Likeness(share, min(matches)[0], _nearest(matches))


def _nearest(matches: list[tuple[float, int, int]]) -> tuple[tuple[int, int], ...]:
    """Of (distance, frame, frame), each frame with the `TRIED` that are most like it."""
    times = Counter[tuple[int, int]]()
    nearest: list[tuple[int, int]] = []
    for _, i, j in sorted(matches):
        if times[0, i] < TRIED or times[1, j] < TRIED:
            nearest.append((i, j))
            times.update([(0, i), (1, j)])
    return tuple(nearest)


def _judged(
    alike: Iterator[tuple[Pair, Likeness]], store: Store, num_frames: int
) -> Iterator[tuple[Pair, Likeness, bool]]:
    """With each pair, whether in half of the frames alike, of either clip, what stands still agrees."""

    @lru_cache(_CHUNK)
    def shown(clip: Window) -> dict[str, np.ndarray]:
        return _kept(store, "pictures", clip, num_frames)

    def same(found: tuple[Pair, Likeness]) -> bool:
        (a, b), frames = map(shown, found[0]), found[1].frames
        agreeing = [
            (i, j)
            for i, j in frames
            if agree(a["small"][i], b["small"][j], a["still"][i] & b["still"][j])
        ]
        return any(
            2 * len({match[side] for match in agreeing}) >= len({match[side] for match in frames})
            for side in (0, 1)
        )

    with thread_pool() as pool:
        while batch := list(islice(alike, _CHUNK)):
            for (pair, likeness), verdict in zip(batch, pool.map(same, batch), strict=True):
                yield pair, likeness, verdict


def _close(ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Pairs of frames that look alike, with their distance."""
    for start in range(0, len(ours), _CHUNK):
        apart = distances(ours[start : start + _CHUNK], theirs)
        for i, j in zip(*(indices.tolist() for indices in np.nonzero(apart <= ALIKE)), strict=True):
            yield start + i, j, float(apart[i, j])
