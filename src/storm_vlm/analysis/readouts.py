"""Watch the thought: latents drawn as frames, laid over the input, and read as words (cf. paper, Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from storm_vlm.analysis.states import States, visual_tokens
from storm_vlm.data.prompt import answer_text
from storm_vlm.data.row import Row
from storm_vlm.data.video import read_video
from storm_vlm.evaluation.statistics import Estimate, estimate
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.backbones import input_device, unwrap
from storm_vlm.model.rollout import head
from storm_vlm.training.config import FRAMES_PER_SLOT

SIDE = 32  # pixels of an imagined frame
BASIS = 96  # pictures that every imagined frame is a mixture of
HIDDEN = 256


@dataclass(frozen=True)
class Decoder:
    """From a latent state (..., D) to a frame (..., 3, SIDE, SIDE) from 0 to 1: a two-layer network chooses how much
    of each picture of a basis shared by all slots. It never sees the clip, so what it draws is in the latent."""

    network: nn.Module
    mean: Tensor  # (pixels,)
    basis: Tensor  # (BASIS, pixels), orthonormal

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        pixels = self.network(latents) @ self.basis + self.mean
        return pixels.clamp(0, 1).unflatten(-1, (3, SIDE, SIDE))


def train_decoder(latents: Tensor, frames: Tensor, epochs: int = 40, seed: int = 0) -> Decoder:
    """Fit latents (N, K, D) to the frames (N, K, 3, SIDE, SIDE) of the rows' thought videos.

    The basis is the frames' principal components; least squares in it is least squares in pixels.
    """
    pixels, states = frames.flatten(0, 1).flatten(1), latents.flatten(0, 1)
    mean = pixels.mean(0)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    size = min(BASIS, *pixels.shape)
    basis = torch.svd_lowrank(pixels - mean, size, niter=4)[2].T.contiguous()
    wanted = (pixels - mean) @ basis.T
    network = nn.Sequential(nn.Linear(states.shape[-1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, size))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
    batches = max(1, len(states) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * batches)
    for _ in tqdm(range(epochs), "decoder", leave=False):
        for part in torch.randperm(len(states)).tensor_split(batches):
            optimizer.zero_grad()
            F.mse_loss(network(states[part]), wanted[part], reduction="sum").backward()
            optimizer.step()
            schedule.step()
    torch.random.set_rng_state(generator_state)
    return Decoder(network.requires_grad_(False), mean, basis)


def thought_frames(rows: Sequence[Row], budget: int) -> Tensor:
    """The frame (N, K, 3, SIDE, SIDE) in the middle of what each slot's target was pooled from, 0 to 1.

    Every row must have a thought video. Raises VideoError.
    """
    pictures = []
    for row in tqdm(rows, "thought frames", leave=False):
        thought = row.thought_video
        assert thought is not None
        clip = read_video(thought.path, FRAMES_PER_SLOT * budget, thought.start, thought.end)
        frames = clip.frames
        middle = [(2 * k + 1) * len(frames) // (2 * budget) for k in range(budget)]
        pictures.append(_small(frames[middle]))
    return torch.stack(pictures)


def last_frames(rows: Sequence[Row], num_frames: int) -> Tensor:
    """The last frame (N, 3, SIDE, SIDE) that the model is shown of each clip."""
    clips = (read_video(row.video, num_frames, row.start, row.end) for row in rows)
    return torch.cat([_small(clip.frames[-1:]) for clip in clips])


def _small(frames: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class DrawingQuality:
    """PSNR in dB against the true frames of slots 2 to K (slot 1 is what was last seen); intervals over videos."""

    own: Estimate  #: drawn from the row's own latents
    another_clip: Estimate  #: drawn from another clip's
    last_shown: Estimate  #: the last frame shown, copied
    first_thought_held: Estimate  #: the thought video's first frame, which the decoder is not given
    mean_frame: Estimate  #: of the training frames
    slots: list[float]  #: mean of `own`, by slot


@dataclass(frozen=True)
class Readouts:
    decoding: DrawingQuality | None  #: None: rows have no thought videos, or too few
    lens: Estimate  #: see `lens_accuracy`


def decoding_quality(
    decoder: Decoder, latents: Tensor, frames: Tensor, last: Tensor, rows: Sequence[Row]
) -> DrawingQuality:
    """Of frames drawn from latents (N, K, D) of rows that the decoder was not trained on.

    `frames` (N, K, 3, SIDE, SIDE) are the true ones, `last` (N, 3, SIDE, SIDE) the last ones shown.
    """
    videos = [row.video for row in rows]
    places = list(range(len(rows)))
    donors = [
        next((j for j in (*places[i + 1 :], *places) if videos[j] != videos[i]), i) for i in places
    ]
    drawn = {
        "own": decoder(latents),
        "another_clip": decoder(latents[donors]),
        "last_shown": last[:, None].expand_as(frames),
        "first_thought_held": frames[:, :1].expand_as(frames),
        "mean_frame": decoder.mean.unflatten(0, (3, SIDE, SIDE)).expand_as(frames),
    }
    start = 1 if frames.shape[1] > 1 else 0
    quality = {
        name: estimate(psnr(picture[:, start:], frames[:, start:]).numpy(), videos)
        for name, picture in drawn.items()
    }
    own = drawn["own"].unbind(1), frames.unbind(1)
    return DrawingQuality(
        **quality, slots=[float(psnr(*slot).mean()) for slot in zip(*own, strict=True)]
    )


def psnr(drawn: Tensor, frames: Tensor) -> Tensor:
    """(N,) in dB of (N, …) pixels from 0 to 1; at most 60."""
    error = (drawn - frames).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-6).log10()


@torch.no_grad()
def similarity_maps(pipeline: StormPipeline, row: Row, latents: Tensor, states: States) -> Tensor:
    """How much each visual token of the clip points where each slot's state does: (K, grids, h, w).

    Cosines; in whitened space, what a token adds along the state's direction: a target is a mean of tokens, in which
    one that says little weighs little (with cosines, slot 1 of the micro world finds the ball half as often).
    """
    inputs = pipeline.collator.videos.get(row.video, row.start, row.end)
    (tokens,) = visual_tokens(pipeline, [inputs])
    visual = tokens.float().cpu()
    if states.whitened_space:
        mean, matrix = states.whitening
        visual = (visual - mean) @ matrix
    else:
        visual = F.normalize(visual, dim=-1)
    maps = F.normalize(latents, dim=-1) @ visual.flatten(0, 2).T
    return maps.view(len(latents), *visual.shape[:3])


@torch.no_grad()
def logit_lens(
    pipeline: StormPipeline, latents: Tensor, top: int = 3
) -> list[list[tuple[str, float]]]:
    """For each of (K, D) states the tokens that the output layer would choose, with their probabilities."""
    model: Any = unwrap(pipeline.model)
    logits = head(model, latents.to(input_device(model), model.dtype)).float()
    chances, ids = logits.softmax(-1).topk(top)

    def shown(token: int) -> str:
        text = pipeline.processor.tokenizer.decode([token]).strip()
        return text if text.isprintable() and "\ufffd" not in text else "(a byte)"

    return [
        [(shown(token), float(chance)) for token, chance in zip(*slot, strict=True)]
        for slot in zip(ids.tolist(), chances.tolist(), strict=True)
    ]


def lens_accuracy(pipeline: StormPipeline, rows: Sequence[Row], latents: Tensor) -> Estimate:
    """How often the likeliest token of some slot of (N, K, D) states begins the right answer."""
    begins = pipeline.processor.tokenizer([answer_text(row) for row in rows])["input_ids"]
    model: Any = unwrap(pipeline.model)
    with torch.no_grad():
        chosen = head(model, latents.to(input_device(model), model.dtype)).argmax(-1).cpu()
    hits = [ids[0] in slots for ids, slots in zip(begins, chosen.tolist(), strict=True)]
    return estimate(hits, [row.video for row in rows])
