"""What the frozen vision tower makes of clips: computed once, kept on disk.

A frozen tower always sees the same, so neither epochs nor runs need to ask it twice. A file is named by a hash of
all it was made from: another clip, tower or resolution has another name, and nothing stale is ever read. It appears
whole or not at all, so any number of processes can share a folder, and they share the work: each looks again
before it computes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.data.atomic_write import in_one_step
from storm_vlm.data.collator import VideoInputs
from storm_vlm.data.decode import VideoError
from storm_vlm.data.row import Row
from storm_vlm.data.video import Clip, read_frames, read_future, read_video
from storm_vlm.training.config import FRAMES_PER_SLOT

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Excerpt:
    """Frames of a file: of its window, of what comes `after` so many seconds, or those at certain times."""

    path: str
    start: float | None = None
    end: float | None = None
    after: float | None = None
    times: tuple[float, ...] = ()

    def read(self, num_frames: int) -> Clip:
        """At most `num_frames` frames; each of `times` fills a temporal grid. Raises VideoError."""
        if self.times:
            return read_frames(self.path, [t for t in self.times for _ in range(FRAMES_PER_SLOT)])
        if self.after is not None:
            return read_future(self.path, num_frames, self.after)
        return read_video(self.path, num_frames, self.start, self.end)


class Store:
    """A folder of tensors, a file for each excerpt, made by one tower from `num_frames` frames by one `rule`.

    Raises OSError where a file cannot be written, VideoError for a clip that cannot be read.
    """

    def __init__(
        self, folder: Path, model: Any, processor: Any, num_frames: int, **rule: Any
    ) -> None:
        tower = model.model.visual
        weights = (
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            for _, tensor in sorted(tower.state_dict().items())
        )
        self.folder = folder
        self.recipe = {
            "tower": _digest(weights),
            "dtype": str(tower.dtype),
            "pixels": processor.video_processor.to_dict(),
            "frames": num_frames,
            **rule,
        }
        self._recipes: dict[Excerpt, str] = {}  # a clip is taken not to change

    def file(self, excerpt: Excerpt) -> Path:
        return self.folder / f"{_digest([self._recipe(excerpt).encode()])}.safetensors"

    def has(self, excerpt: Excerpt) -> bool:
        """Whether its file is there and whole."""
        try:
            with safe_open(self.file(excerpt), "pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def read(self, excerpt: Excerpt) -> Tensors | None:
        """None for a file that is not there, or damaged."""
        try:
            with safe_open(self.file(excerpt), "pt") as opened:
                # Copies: a process may have some 65,000 files mapped, and data sets have more clips.
                return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, excerpt: Excerpt, tensors: Tensors) -> None:
        file = self.file(excerpt)
        try:
            with in_one_step(file) as unfinished:
                save_file(tensors, unfinished, metadata={"recipe": self._recipe(excerpt)})
        except SafetensorError as error:
            raise OSError(
                f"{file} could not be written ({error}): make room, or name a folder that has it "
                "(target_cache, vision_cache)"
            ) from error

    def _recipe(self, excerpt: Excerpt) -> str:
        if excerpt not in self._recipes:
            part = asdict(excerpt)
            whole = {"clip": _digest(_chunks(part.pop("path"))), "part": part, **self.recipe}
            self._recipes[excerpt] = json.dumps(whole, sort_keys=True, default=str)
        return self._recipes[excerpt]


def made(
    excerpts: Sequence[Excerpt],
    compute: Callable[[Excerpt], Tensors],
    store: Store | None,
    what: str,
) -> Iterator[tuple[Excerpt, Tensors]]:
    """Each excerpt with its tensors, in no order: out of the store if they are there, else computed and kept."""
    missing = []
    for excerpt in tqdm(excerpts, f"{what} on disk", leave=False):
        kept = None if store is None else store.read(excerpt)
        if kept is None:
            missing.append(excerpt)
        else:
            yield excerpt, kept
    random.Random(os.getpid()).shuffle(missing)  # processes begin at different places
    for excerpt in tqdm(missing, what, leave=False):
        tensors = None if store is None else store.read(excerpt)
        if tensors is None:
            tensors = compute(excerpt)
            if store is not None:
                store.write(excerpt, tensors)
        yield excerpt, tensors


@torch.no_grad()
def visual_tokens(model: Any, videos: VideoInputs, excerpt: Excerpt) -> tuple[Tensor, Tensors]:
    """Tokens (N, D) that the tower makes of an excerpt, on the CPU, and what the processor made of it.

    An excerpt goes alone: in company, its tokens' last digits would depend on the others.
    """
    inputs = videos.process(excerpt.read(videos.num_frames))
    device, training = model.model.visual.device, model.training
    (tokens,) = (
        model.eval()
        .model.get_video_features(
            inputs["pixel_values_videos"].to(device), inputs["video_grid_thw"].to(device)
        )
        .pooler_output
    )
    model.train(training)
    return tokens.cpu(), inputs


class KeptVideos(VideoInputs):
    """The clips of `rows` as the frozen tower sees them: `video_features` (N, D) in place of their pixels.

    See `rollout.prompt_embeds`, which puts them where the tower's output would go.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: Iterable[Row],
        num_frames: int,
        cache_bytes: int,
        folder: Path,
    ) -> None:
        super().__init__(processor, num_frames, cache_bytes)
        self.store = Store(folder, model, processor, num_frames)
        wanted = dict.fromkeys(Excerpt(row.video, row.start, row.end) for row in rows)
        missing = [excerpt for excerpt in wanted if not self.store.has(excerpt)]
        for _ in made(missing, lambda e: self._see(model, e), self.store, "visual features"):
            pass  # only to have them on disk

    def _see(self, model: Any, excerpt: Excerpt) -> Tensors:
        tokens, inputs = visual_tokens(model, self, excerpt)
        del inputs["pixel_values_videos"]
        return {"video_features": tokens, **inputs}

    def load(self, path: str, start: float | None, end: float | None) -> Tensors:
        """Raises VideoError if the file has gone since."""
        excerpt = Excerpt(path, start, end)
        tensors = self.store.read(excerpt)
        if tensors is None:
            raise VideoError(
                f"{path}: its visual features are no longer in {self.store.folder}: start again"
            )
        return tensors


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:32]


def _chunks(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                yield chunk
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}); build it again") from error
