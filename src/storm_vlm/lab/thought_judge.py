"""A judge for `visual_gain` on the micro world: a model that has learned to read a thought video behind a clip.

The shipped backbone has not. It finds the answer no likelier with the right thought video than with a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storm_vlm.construction.visual_gain import VisualGain, followed_by
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.data.video import read_video, write_video
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.micro_config import micro_config
from storm_vlm.lab.world.clips import CRF, build_world
from storm_vlm.lab.world.mirrors import NUM_FRAMES
from storm_vlm.lab.world.render import FPS
from storm_vlm.training.train import train

SETTINGS = ("training.learning_rate=3e-3", f"num_frames={2 * NUM_FRAMES}")
SCENES = 1  # their seed: other scenes than those to be judged
STEPS = 0.2  # of training, for each row


def with_visual_gain(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Those rows whose thought videos make the answer no less likely. The judge is trained in the folder, once."""
    gain = VisualGain(str(train_judge(folder, len(rows))))
    return [row for row in rows if gain(row) >= 0]


def train_judge(folder: Path, count: int) -> Path:
    """Trained on `count` scenes, a third of them without their thought videos, which are all right."""
    checkpoint, clips, rows = folder / "judge", folder / "judge-clips", []
    if (checkpoint / "model.safetensors").exists():
        return checkpoint
    world = build_world(folder / "judge-world", "reasoning", "train", count, seed=SCENES)
    clips.mkdir(exist_ok=True)
    for index, row in enumerate(read_rows(world)):
        clip = read_video(row.video, NUM_FRAMES)
        if index % 3 and row.thought_video:
            clip = followed_by(clip, row.thought_video, NUM_FRAMES)
        write_video(clips / f"{index}.mp4", clip.frames, FPS, crf=CRF)
        shown = {"video": str(clips / f"{index}.mp4"), "thought_video": None, "keyframes": ()}
        rows.append(row.model_copy(update=shown))
    write_rows(clips / "rows.jsonl", rows)
    config = micro_config(
        "sft", SETTINGS, clips / "rows.jsonl", max_steps=max(1, round(STEPS * count))
    ).model_copy(update={"model": str(shipped("backbone")), "output_dir": str(checkpoint)})
    return train(config, rows)
