"""The mathematics of STORM: thought-video targets and the two training losses (paper, section 3.3).

Shape legend, used in the whole package: B batch, T tokens, K latent slots, N visual tokens, D hidden size,
A answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
TargetNormalization = Literal["none", "whiten"]
AlignmentReduction = Literal["mean", "sum"]


def pool_targets(tokens: Tensor, num_slots: int) -> Tensor:
    """Compress the visual tokens of one thought video into one target per latent slot (section 3.3, Stage I).

    Target k is the mean of the k-th of K adaptive segments of the token sequence.

    Args:
        tokens: (N, D) visual tokens of all sampled frames, in temporal order.
        num_slots: K, at least 1.

    Returns:
        (K, D) float32.
    """
    return F.adaptive_avg_pool1d(tokens.float().T, num_slots).T.contiguous()


def target_whitening(targets: Tensor, ridge: float = 0.003) -> tuple[Tensor, Tensor]:
    """Mean (D,) and whitening matrix (D, D) of the training set's targets (..., D), in float32.

    Pooled visual tokens vary along few directions, and what a step of reasoning must carry (which way something
    is heading, say) can be a hundredth of what varies most (where it is). Whitening gives every direction its
    say. ``ridge``, a share of the total variance, keeps directions of mere noise small.
    """
    rows = targets.float().flatten(0, -2)
    mean = rows.mean(0)
    rows = rows - mean
    return mean, whitening_matrix(rows.T @ rows / len(rows), ridge)


def whitening_matrix(covariance: Tensor, ridge: float = 0.003) -> Tensor:
    """(D, D) of the covariance (D, D): see `target_whitening`."""
    variances, directions = torch.linalg.eigh(covariance)
    scales = (variances.clamp_min(0) + ridge * variances.sum()).clamp_min(1e-12).rsqrt()
    return directions * scales @ directions.T


def whiten_targets(targets: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Targets (..., D) in the coordinates of `target_whitening`, each with root mean square 1; float32.

    A state leaves an RMSNorm, so it has about that length, too.
    """
    white = (targets.float() - mean) @ matrix
    return white * white.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def alignment_loss(
    states: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    reduction: AlignmentReduction = "mean",
    count: Tensor | None = None,
) -> Tensor:
    """Mean squared error of latent states and thought-video targets (Eq. 3, latent term), in float32.

    Args:
        states: (B, K, D) latent states.
        targets: (B, K, D) pooled targets; never receive a gradient.
        mask: (B,) bool, False where a row has no thought video; its ``targets`` are ignored, whatever they hold.
            (B, K): False where it has no such slot, either.
        reduction: over D: ``mean`` is what "MSE" means in most code, ``sum`` the squared distance. Our copy of the
            paper lacks the formula; they differ by a factor of D in what the weight 0.1 amounts to.
        count: what the sum over rows is divided by: the valid rows of the larger batch that this one is part of;
            None: of this one.

    Returns:
        Scalar mean over valid rows, their slots (and dimensions); an exact 0 that still carries a graph if no row is
        valid, so that every rank of a distributed run has a backward pass.
    """
    error = states.float() - targets.detach().float()
    scale = error.shape[-1] if reduction == "sum" else 1
    valid = error.new_ones(error.shape[:2], dtype=torch.bool)
    if mask is not None:
        valid = valid & mask.to(error.device).view(len(error), -1)
    # masked_fill before squaring: NaN targets of absent videos must not reach the gradient
    each = error.masked_fill(~valid[:, :, None], 0.0).square().mean(-1)  # (B, K)
    rows = (valid.any(1).sum() if count is None else count).clamp_min(1)
    return (each.sum(1) / valid.sum(1).clamp_min(1)).sum() / rows * scale


def answer_loss(logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """Cross-entropy of the answer tokens (Eq. 3, answer term), in float32.

    Args:
        logits: (B, A, V); position a chooses answer token a (already aligned, no shift here).
        labels: (B, A) token ids, -100 where there is no answer token.
        count: what the sum over tokens is divided by, as in `alignment_loss`.

    Returns:
        Scalar mean over all answer tokens of the batch; 0 with a graph if there are none.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return losses / ((labels != IGNORE_INDEX).sum() if count is None else count).clamp_min(1)


def storm_loss(answer: Tensor, alignment: Tensor, weight: float) -> Tensor:
    """The Stage I objective (Eq. 4); ``weight`` 0 is Stage II, where only the answer term is left."""
    return answer + weight * alignment
