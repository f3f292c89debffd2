"""Shares and how sure they are: intervals by a bootstrap over videos, since questions about one video go together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values (a share, a difference, a distance …) and its 95% interval.

    What was not measured has no estimate: None stands in its place.
    """

    mean: float
    low: float
    high: float
    n: int

    def __neg__(self) -> Estimate:
        # From nought, lest it be -0.0.
        return Estimate(0.0 - self.mean, 0.0 - self.high, 0.0 - self.low, self.n)


def accuracy(outcomes: Sequence[bool | None]) -> float:
    """Share of right answers; unparsed ones stay in the denominator."""
    return sum(bool(outcome) for outcome in outcomes) / len(outcomes) if outcomes else float("nan")


def _clusters(clusters: Sequence[Hashable] | None, rows: int) -> NDArray[np.int64]:
    """Cluster numbers (rows,), in the order in which the clusters first occur; by default, each row its own."""
    if clusters is None:
        return np.arange(rows)
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], int)


def _weights(groups: int, resamples: int, rng: np.random.Generator) -> Iterator[NDArray]:
    """How often each cluster is drawn, (some resamples, groups) at a time."""
    at_once = max(1, 2**22 // groups)
    for first in range(0, resamples, at_once):
        many = min(at_once, resamples - first)
        drawn = rng.integers(0, groups, (many, groups)) + groups * np.arange(many)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=many * groups)
        yield counts.reshape(many, groups).astype(float)


def _sums(columns: NDArray, clusters: NDArray[np.int64]) -> NDArray:
    """Columns (rows, M) summed within clusters: (groups, M)."""
    sums = np.zeros((clusters.max() + 1, columns.shape[1]))
    np.add.at(sums, clusters, columns)
    return sums


def _percentiles(values: NDArray) -> tuple[NDArray, NDArray]:
    low, high = np.nanpercentile(values, [2.5, 97.5], axis=0)
    return low, high


def estimate(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
) -> Estimate:
    """The mean of (rows,) values, with an interval over clusters if given, else over values.

    Raises ValueError for no values, and where there is not one cluster a value.
    """
    each = np.asarray(values, float)
    if not len(each) or (clusters is not None and len(each) != len(clusters)):
        raise ValueError(f"{len(each)} values for {0 if clusters is None else len(clusters)} rows")
    (mean,), _ = category_estimates(each, np.ones((len(each), 1), bool), clusters, resamples)
    return mean


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray], NDArray],
    clusters: Sequence[Hashable],
    resamples: int = 2000,
) -> Estimate:
    """A statistic of the means of (rows, M) values, with an interval over clusters.

    `statistic` takes means (…, M) of many resamples at once.
    """
    each = np.asarray(values, float)
    clustered, rng = _clusters(clusters, len(each)), np.random.default_rng(0)
    sums, counts = _sums(each, clustered), _sums(np.ones((len(each), 1)), clustered)
    means = [(w @ sums) / (w @ counts) for w in _weights(len(sums), resamples, rng)]
    low, high = _percentiles(statistic(np.concatenate(means)))
    return Estimate(float(statistic(each.mean(0))), float(low), float(high), len(each))


def category_estimates(
    values: ArrayLike,
    members: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
) -> tuple[list[Estimate], Estimate]:
    """The mean of each category, and the mean of these means (macro); percentile bootstraps over clusters.

    `members` (rows, M) says who belongs to which category. One resample of the clusters serves them all.
    """
    member = np.asarray(members, float)
    each = np.asarray(values, float)
    data = each[:, None] * member
    clustered = _clusters(clusters, len(member))
    hits, counts = _sums(data, clustered), _sums(member, clustered)
    rng = np.random.default_rng(0)
    with np.errstate(
        invalid="ignore"
    ):  # a rare category may be drawn by no resample: nan, left out
        means = np.concatenate(
            [(w @ hits) / (w @ counts) for w in _weights(len(hits), resamples, rng)]
        )
    macro = np.nansum(means, 1) / (~np.isnan(means)).sum(1)
    low, high = _percentiles(means)
    macro_low, macro_high = _percentiles(macro)
    categories = [
        Estimate(float(each[one].mean()), float(low[i]), float(high[i]), int(one.sum()))
        for i, one in enumerate(member.astype(bool).T)
    ]
    mean = float(np.mean([category.mean for category in categories]))
    return categories, Estimate(mean, float(macro_low), float(macro_high), len(categories))


def paired_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 4000,
) -> Estimate:
    """Mean difference of two methods on the same rows; its `n` counts rows of all seeds.

    Both are (rows,) or (seeds, rows) outcomes. Seeds and clusters of rows are resampled together (a two-level
    bootstrap), so that the interval covers a new seed as well as new videos.
    """
    difference = np.atleast_2d(np.asarray(ours, float) - np.asarray(theirs, float))
    seeds, rows = difference.shape
    clustered = _clusters(clusters, rows)
    sums, counts = _sums(difference.T, clustered), _sums(np.ones((rows, 1)), clustered)
    rng = np.random.default_rng(0)
    by_seed = np.concatenate(
        [(w @ sums) / (w @ counts) for w in _weights(len(sums), resamples, rng)]
    )  # (resamples, seeds)
    drawn = np.concatenate(list(_weights(seeds, resamples, rng)))
    low, high = _percentiles((by_seed * drawn).sum(1) / seeds)
    return Estimate(float(difference.mean()), float(low), float(high), difference.size)


def mean_over_seeds(outcomes: ArrayLike) -> Estimate:
    """Mean of (seeds, rows) outcomes with its 95% interval, as in `paired_difference`.

    With few seeds it reaches hardly beyond the worst and the best of them; with one, it is over rows alone.
    """
    values = np.atleast_2d(np.asarray(outcomes, float))
    return paired_difference(values, np.zeros_like(values))


def only_right(ours: ArrayLike, theirs: ArrayLike) -> tuple[int, int]:
    """How many rows only ours, and only theirs, has right (what McNemar's test looks at); over all seeds."""
    a, b = np.asarray(ours, bool), np.asarray(theirs, bool)
    return int((a & ~b).sum()), int((~a & b).sum())
