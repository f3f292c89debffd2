"""What the frozen vision tower makes of clips: computed once, kept on disk (see `data/store.py`).

A frozen tower always sees the same, so neither epochs nor runs need to ask it twice. Processes that share a folder
share the work: each looks again before it computes.
"""

from __future__ import annotations

import inspect
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.data.collator import LAYOUT, VideoInputs
from storm_vlm.data.decode import VideoError
from storm_vlm.data.row import Row
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.video import Clip, read_frames, read_future, read_video
from storm_vlm.model.backbones import Backbone, backbone
from storm_vlm.training.config import FRAMES_PER_SLOT

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Excerpt:
    """Frames of a file: of its window, of what comes `after` so many seconds, or those at certain times.

    Its targets are `slots` in number; None: K.
    """

    path: str
    start: float | None = None
    end: float | None = None
    after: float | None = None
    times: tuple[float, ...] = ()
    slots: int | None = None

    def read(self, num_frames: int) -> Clip:
        """At most `num_frames` frames; each of `times` fills a temporal grid. Raises VideoError."""
        if self.times:
            return read_frames(self.path, [t for t in self.times for _ in range(FRAMES_PER_SLOT)])
        if self.after is not None:
            return read_future(self.path, num_frames, self.after)
        return read_video(self.path, num_frames, self.start, self.end)


class FeatureCache:
    """Tensors of excerpts, a file each, made by one tower from `num_frames` frames by one `rule`.

    Raises OSError where a file cannot be written, VideoError for a clip that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: Literal["features", "targets"],
        model: Any,
        processor: Any,
        num_frames: int,
        **rule: Any,
    ) -> None:
        adapter, weights = backbone(model), sha256()
        tower = adapter.vision_tower
        for _, tensor in sorted(tower.state_dict().items()):
            weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        self.store, self.kind = Store(folder), kind
        self.recipe = {
            "adapter": _source(type(adapter)),
            "tower": weights.hexdigest(),
            "dtype": str(next(tower.parameters()).dtype),
            "pixels": json.loads(processor.video_processor.to_json_string()),
            "frames": num_frames,
            **rule,
        }

    def key(self, excerpt: Excerpt) -> str:
        part = asdict(excerpt)
        try:
            clip = self.store.content(part.pop("path"))
        except OSError as error:
            raise VideoError(
                f"{excerpt.path}: cannot be read ({error.strerror}); build it again"
            ) from error
        return key_of(clip=clip, part=part, **self.recipe)

    def read(self, excerpt: Excerpt) -> Tensors | None:
        """None for a file that is not there, or damaged."""
        # Not mapped: a process may have some 65,000 files mapped, and data sets have more clips.
        key = self.key(excerpt)
        return self.store.read(self.kind, key, lambda p: load(p.read_bytes()), ".safetensors")

    def has(self, excerpt: Excerpt) -> bool:
        """Whether its file is there and whole, by its header alone."""

        def whole(file: Path) -> bool:
            with safe_open(file, "pt"):
                return True

        return bool(self.store.read(self.kind, self.key(excerpt), whole, ".safetensors"))

    def fill(self, excerpts: Iterable[Excerpt], compute: Callable[[Excerpt], Tensors]) -> None:
        """Compute and keep what is missing."""
        distinct = list(dict.fromkeys(excerpts))
        missing = [
            e for e in tqdm(distinct, f"{self.kind} on disk", leave=False) if not self.has(e)
        ]
        random.Random(os.getpid()).shuffle(missing)  # processes begin at different places
        for excerpt in tqdm(missing, self.kind, leave=False):
            if not self.has(excerpt):
                tensors = compute(excerpt)
                with self.store.place(self.kind, self.key(excerpt), ".safetensors") as unfinished:
                    save_file(tensors, unfinished)


def _source(adapter: type[Backbone]) -> list[str]:
    """What an adapter and its bases are called, and the hash of their code: it decides what a tower's output is."""
    found = []
    for part in adapter.__mro__[:-1]:
        found.append(f"{part.__module__}:{part.__qualname__}")
        with suppress(OSError, TypeError):  # of a class made in a shell there is no source
            found.append(sha256(inspect.getsource(part).encode()).hexdigest())
    return found


@torch.no_grad()
def clip_features(model: Any, videos: VideoInputs, excerpt: Excerpt) -> tuple[Tensor, Tensors]:
    """What the tower makes of an excerpt (N, F), on the CPU, and what the processor made of it.

    An excerpt goes alone: in company, its tokens' last digits would depend on the others.
    """
    inputs, base = videos.process(excerpt.read(videos.num_frames)), backbone(model)
    device, training = next(base.vision_tower.parameters()).device, model.training
    model.eval()
    features = base.video_features({name: tensor.to(device) for name, tensor in inputs.items()})
    model.train(training)
    return features.cpu(), inputs


class CachedVideoInputs(VideoInputs):
    """The clips of `rows` as the frozen tower sees them: `video_features` (N, F) in place of their pixels.

    See `Backbone.prompt_inputs`, which puts them where the tower's output would go. Computes what `folder` lacks.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: Sequence[Row],
        num_frames: int,
        cache_bytes: int,
        folder: str | Path,
    ) -> None:
        super().__init__(processor, num_frames, cache_bytes)
        self.cache = FeatureCache(folder, "features", model, processor, num_frames, holds=LAYOUT)

        def features(excerpt: Excerpt) -> Tensors:
            tensors, inputs = clip_features(model, self, excerpt)
            del inputs[backbone(model).pixels]
            return {"video_features": tensors, **inputs}

        self.cache.fill((Excerpt(row.video, row.start, row.end) for row in rows), features)

    def load(self, path: str, start: float | None, end: float | None) -> Tensors:
        """Raises VideoError if the file has gone since."""
        tensors = self.cache.read(Excerpt(path, start, end))
        if tensors is None:
            folder = self.cache.store.folder
            raise VideoError(f"{path}: its visual features are no longer in {folder}: start again")
        return tensors
