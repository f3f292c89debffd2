"""The micro world: its physics against an independent restatement, and what makes it a fair test."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from storm_vlm.data.answer import is_correct
from storm_vlm.data.row import read_rows
from storm_vlm.data.video import read_video
from storm_vlm.lab.world.clips import build_world
from storm_vlm.lab.world.distorted import DISTORTIONS, with_distorted_thoughts
from storm_vlm.lab.world.mirrors import FAR_HORIZON, HORIZON, NUM_FRAMES, shortcuts
from storm_vlm.lab.world.questions import (
    PERCEPTION_FAMILIES,
    REASONING_FAMILIES,
    answers,
    ask_perception,
    plan,
    sample_reasoning,
)
from storm_vlm.lab.world.render import (
    CELL,
    DARK,
    PAINT,
    THOUGHT_STEPS,
    clip_frames,
    thought_frames,
)
from storm_vlm.lab.world.simulator import (
    OUT_OF_DISTRIBUTION,
    PERCEPTION,
    REASONING,
    SIZE,
    Ball,
    Tile,
    cell_name,
    sample_scene,
    simulate,
)


def restated(tiles: dict, position: complex, velocity: complex, colour: str, steps: int) -> list:
    """The rules again, in complex numbers: x + iy with y downwards; a mirror is a reflection."""
    track = [(position, velocity, colour)]
    for _ in range(steps):
        target = position + velocity
        kind, paint = tiles.get(target, ("", ""))
        inside = 0 <= target.real < SIZE and 0 <= target.imag < SIZE
        if not inside or kind == "block":
            velocity = -velocity
        else:
            position = target
            if kind == "slash":
                velocity = -1j * velocity.conjugate()
            elif kind == "backslash":
                velocity = 1j * velocity.conjugate()
            elif kind == "pad":
                colour = paint
        track.append((position, velocity, colour))
    return track


def test_physics_follow_the_rules() -> None:
    velocities = {"right": 1, "left": -1, "down": 1j, "up": -1j}
    for seed in range(200):
        scene = sample_scene(random.Random(seed), REASONING)
        tiles = {complex(c, r): (t.kind, t.colour) for (r, c), t in scene.tiles.items()}
        (track,) = scene.tracks
        row, column = track[0].cell
        expected = restated(
            tiles,
            complex(column, row),
            velocities[track[0].heading],
            track[0].colour,
            len(track) - 1,
        )
        for ball, (position, velocity, colour) in zip(track, expected, strict=True):
            assert complex(ball.cell[1], ball.cell[0]) == position
            assert (velocities[ball.heading], ball.colour) == (velocity, colour)


def test_a_slow_ball_takes_the_same_way_in_twice_the_time() -> None:
    tiles = {(0, 3): Tile("backslash"), (2, 3): Tile("block", "red")}
    fast = simulate(tiles, Ball((0, 0), "right", "blue", came="right"), 7)
    slow = simulate(tiles, Ball((0, 0), "right", "blue", came="right", period=2), 14)
    assert [b.cell for b in slow[::2]] == [b.cell for b in fast]
    assert [b.heading for b in slow[::2]] == [b.heading for b in fast]
    assert fast[4].cell == (1, 3) and fast[5].hit == "red block" and fast[5].heading == "up"


@pytest.fixture(scope="module")
def asked() -> list:
    return list(sample_reasoning(random.Random(3), REASONING, 2000, HORIZON))


def test_reasoning_answers_are_balanced_and_shortcuts_fail(asked: list) -> None:
    for family in REASONING_FAMILIES:
        counts = Counter(q.answer for _, q in asked if q.family == family)
        assert set(counts) <= set(answers(family))
        assert max(counts.values()) / sum(counts.values()) < 1.6 / len(answers(family))
    for way in ("last_seen", "straight_line"):
        right = [shortcuts(scene, q)[way] == q.answer for scene, q in asked]
        assert sum(right) / len(right) < 0.3, way


def test_answers_are_hidden_until_the_last_step_asked_about(asked: list) -> None:
    """The clip ends before anything the question is about, and the oracle's plan ends in the answer."""
    for scene, question in asked[:300]:
        assert HORIZON[0] <= question.steps <= HORIZON[1]
        assert plan(scene, question).endswith(f"The answer is {question.answer}.")
        assert f"step {question.steps}:" in plan(scene, question)
        assert len(clip_frames(scene)) == NUM_FRAMES == 2 * scene.shown_steps


def test_every_perception_family_asks_and_is_not_about_the_future() -> None:
    found: Counter = Counter()
    for seed in range(150):
        scene = sample_scene(random.Random(seed), PERCEPTION)
        for family in PERCEPTION_FAMILIES:
            question = ask_perception(scene, random.Random(seed), family)
            if question is not None:
                found[family] += 1
                assert question.steps == 0
    assert all(found[family] > 20 for family in PERCEPTION_FAMILIES), found


def test_thought_video_lights_the_ball_and_the_block_it_hits() -> None:
    asked = sample_reasoning(random.Random(5), REASONING, 60, HORIZON)
    scene, question = next((s, q) for s, q in asked if q.family == "first_hit")
    last = thought_frames(scene, question.steps, 8)[-1]
    lit = (last != DARK).any(-1).reshape(SIZE, CELL, SIZE, CELL).any((1, 3))
    assert lit.sum() == 2
    colour = PAINT[question.answer.split()[0]]
    assert (last == colour).all(-1).sum() > 150  # the answer is in the video


def test_thought_video_starts_where_the_clip_ends_and_holds_the_end() -> None:
    scene = next(
        scene
        for scene, _ in sample_reasoning(random.Random(0), REASONING, 50, HORIZON)
        if not scene.cover
    )
    frames = thought_frames(scene, hidden_steps=5, length=8)
    row, column = scene.after(0).cell
    lit = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
    assert np.array_equal(frames[1][lit], clip_frames(scene)[-1][lit])
    assert np.array_equal(frames[10:12], frames[14:16])
    assert not np.array_equal(frames[8:10], frames[10:12])
    for k in range(6):  # temporal grid k shows step k: the ball is in the light of its cell
        ball = scene.after(k)
        row, column = ball.cell
        lit = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
        assert (frames[2 * k + 1][lit] == PAINT[ball.colour]).all(-1).sum() > 80


def test_the_cover_hides_tiles_after_the_first_step_but_not_in_the_thought_video() -> None:
    scene = next(s for i in range(500) if (s := sample_scene(random.Random(i), REASONING)).cover)
    row, column = next(iter(scene.cover))
    place = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
    clip = clip_frames(scene)
    assert not np.array_equal(clip[0][place], clip[2][place])
    assert np.array_equal(clip[2][place], clip[-1][place])


def test_splits_share_no_scene_and_a_second_build_changes_nothing(tmp_path: Path) -> None:
    seen: dict[bytes, str] = {}
    for split in ("train", "validation", "test", "ood"):
        path = build_world(tmp_path, "reasoning", split, 12)  # type: ignore[arg-type]
        for row in read_rows(path):
            clip = Path(row.video).read_bytes()
            assert seen.setdefault(clip, split) == split
            assert row.thought_video is not None and Path(row.thought_video.path).exists()
            assert row.split == split
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*.mp4")}
    rows = path.read_bytes()
    next(iter(before)).unlink()  # as if interrupted
    build_world(tmp_path, "reasoning", "ood", 12)
    build_world(tmp_path, "reasoning", "train", 12)
    for split in ("validation", "test"):
        build_world(tmp_path, "reasoning", split, 12)  # type: ignore[arg-type]
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*.mp4")}
    assert path.read_bytes() == rows
    assert {p: data for p, (_, data) in after.items()} == {p: d for p, (_, d) in before.items()}
    assert sum(after[p] != before[p] for p in before) == 1


def test_ood_scenes_are_longer_and_fuller() -> None:
    far = list(sample_reasoning(random.Random(1), OUT_OF_DISTRIBUTION, 40, FAR_HORIZON))
    assert all(q.steps > HORIZON[1] and len(scene.tracks) == 2 for scene, q in far)


def test_clips_survive_encoding(tmp_path: Path) -> None:
    row = read_rows(build_world(tmp_path, "perception", "test", 1))[0]
    clip = read_video(row.video, NUM_FRAMES)
    assert clip.frames.shape == (NUM_FRAMES, SIZE * CELL, SIZE * CELL, 3)
    assert np.allclose(np.diff(clip.timestamps), 0.25)


def test_a_folder_built_again_with_another_count_shows_what_its_rows_ask(tmp_path: Path) -> None:
    build_world(tmp_path / "grown", "reasoning", "train", 3)
    grown = read_rows(build_world(tmp_path / "grown", "reasoning", "train", 8))
    fresh = read_rows(build_world(tmp_path / "fresh", "reasoning", "train", 8))
    for one, other in zip(grown, fresh, strict=True):
        assert one.question == other.question
        assert Path(one.video).read_bytes() == Path(other.video).read_bytes()


def test_a_moment_is_when_the_clip_shows_it(tmp_path) -> None:
    """By the clip's own frames: the ball's white ring is in the cell asked about then, and at no other time."""
    rows = read_rows(build_world(tmp_path, "grounding", "test", 12))
    assert [row.meta["family"] for row in rows] == ["when", "track"] * 12
    assert all(("moment" in row.meta) == (row.meta["family"] == "when") for row in rows)
    for row in (row for row in rows if "moment" in row.meta and row.meta["balls"] == 1):
        start, end = row.meta["moment"]
        assert row.answer == f"{start} - {end}" and is_correct(row.answer, row)
        asked = row.question.split(" at ")[1][:2]
        clip = read_video(row.video, NUM_FRAMES)
        centres = np.stack([np.median(np.argwhere((f > 200).all(-1)), 0) for f in clip.frames])
        cells = centres.reshape(-1, 2, 2).mean(1).astype(int) // CELL  # of the two frames of a step
        inside = [cell_name((int(line), int(column))) == asked for line, column in cells]
        within = [bool(start <= time < end) for time in clip.timestamps[::2]]
        assert inside == within, row.question


def test_a_chain_s_row_has_a_slot_for_each_step_and_a_thought_video_of_as_many(tmp_path) -> None:
    rows = read_rows(build_world(tmp_path, "reasoning", "test", 40, world="chains"))
    assert {row.meta["steps"] for row in rows} == set(range(3, 8))
    for row in rows[:8]:
        thought = row.thought_video
        assert thought is not None and row.slots == row.meta["steps"] + 1
        shown = read_video(thought.path, 2 * row.slots, thought.start, thought.end)
        whole = read_video(thought.path, 2 * THOUGHT_STEPS)
        assert np.array_equal(shown.frames, whole.frames[: 2 * row.slots])


def test_distorted_thought_videos_show_the_same_steps_badly(tmp_path: Path) -> None:
    rows = read_rows(build_world(tmp_path, "reasoning", "train", 2))
    last = 2 * THOUGHT_STEPS - 1
    shown = {"fast": [*range(0, last, 2), *[last] * 8], "slow": [i // 2 for i in range(last + 1)]}
    speeds = set()
    for how in DISTORTIONS:
        for made, true in zip(
            with_distorted_thoughts(rows, tmp_path / "w", how), rows, strict=True
        ):
            assert made.thought_video and true.thought_video
            made_frames, frames = (
                read_video(video.path, 99).frames.astype(int)
                for video in (made.thought_video, true.thought_video)
            )
            assert made_frames.shape == frames.shape == (last + 1, 128, 128, 3)
            if how in shown:
                apart = abs(made_frames - frames[shown[how]]).mean((1, 2, 3))
                assert apart.max() < 2, how
            elif how == "blurred":
                assert 1 < abs(made_frames - frames).mean() < 20
                file = Path(made.thought_video.path)
                assert file.stat().st_size < Path(true.thought_video.path).stat().st_size / 2
            else:
                held = 2 * true.thought_video.provenance["hidden_steps"]
                apart = [abs(frames - frame).mean((1, 2, 3)) for frame in made_frames]
                nearest = [min(int(row.argmin()), held) for row in apart]
                assert nearest == sorted(nearest)
                speeds.add(tuple(nearest))
    assert len(speeds) == 2
