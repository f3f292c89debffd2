"""Intervals over videos, paired differences, and their coverage."""

import time

import numpy as np
import pytest

from storm_vlm.evaluation.statistics import (
    Estimate,
    accuracy,
    category_estimates,
    estimate,
    mean_over_seeds,
    only_right,
    paired_difference,
)


def clustered(
    rng: np.random.Generator, videos: int, questions: int
) -> tuple[np.ndarray, list[int]]:
    """Hits (rows,) with mean 1/2; the questions of a video are about as hard as each other."""
    ease = rng.beta(0.6, 0.6, videos)
    hits = (rng.random((videos, questions)) < ease[:, None]).astype(float)
    return hits.ravel(), np.repeat(np.arange(videos), questions).tolist()


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = estimate(rng.random(80) < 0.4, resamples=300)
        covered += found.low <= 0.4 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_clustered_interval_covers_where_one_over_questions_does_not() -> None:
    rng = np.random.default_rng(0)
    covered = {"videos": 0, "questions": 0}
    for _ in range(200):
        hits, videos = clustered(rng, 60, 6)
        for name, clusters in (("videos", videos), ("questions", None)):
            found = estimate(hits, clusters, resamples=300)
            covered[name] += found.low <= 0.5 <= found.high
    assert 0.89 <= covered["videos"] / 200 <= 0.99
    assert covered["questions"] / 200 < 0.8


def test_clusters_of_one_are_no_clusters() -> None:
    rng = np.random.default_rng(1)
    hits = rng.random(150) < 0.3
    found = estimate(hits)
    assert estimate(hits, [f"v{i}" for i in range(150)]) == found
    # What resampling the values themselves gives.
    plain = np.asarray(hits, float)[np.random.default_rng(7).integers(0, 150, (2000, 150))].mean(1)
    assert (found.low, found.high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.01)


def test_the_same_question_asked_thrice_is_not_three_questions() -> None:
    rng = np.random.default_rng(2)
    hits = (rng.random(100) < 0.5).astype(float)
    once = estimate(hits)
    thrice = estimate(np.repeat(hits, 3), np.repeat(np.arange(100), 3).tolist())
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=1e-12)


def test_categories_have_their_own_intervals_and_macro_weighs_them_equally() -> None:
    rng = np.random.default_rng(3)
    big, small = (rng.random(900) < 0.9).astype(float), (rng.random(100) < 0.1).astype(float)
    hits = np.concatenate([big, small])
    members = np.zeros((1000, 2), bool)
    members[:900, 0] = members[900:, 1] = True
    (large, little), macro = category_estimates(hits, members)
    assert large.low < large.mean == big.mean() < large.high and large.n == 900
    assert little.low < little.mean == small.mean() < little.high and little.n == 100
    assert little.high - little.low > large.high - large.low  # fewer questions, less sure
    assert macro.low < macro.mean < macro.high < hits.mean() and macro.n == 2
    assert macro.mean == pytest.approx((big.mean() + small.mean()) / 2)


def test_a_category_that_a_resample_misses_does_no_harm() -> None:
    members = np.zeros((20, 2), bool)
    members[:, 0] = members[0, 1] = True
    categories, macro = category_estimates(np.ones(20), members)
    assert categories == [Estimate(1, 1, 1, 20), Estimate(1, 1, 1, 1)]
    assert macro == Estimate(1, 1, 1, 2)


def test_paired_difference_is_sharper_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(0)
    theirs = (rng.random((3, 300)) < 0.5).astype(float)
    ours = np.maximum(theirs, rng.random((3, 300)) < 0.2)
    found = paired_difference(ours, theirs)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx((ours - theirs).mean())
    assert found.low > 0.03
    unpaired = estimate(ours[0]).high - estimate(theirs[0]).low
    assert found.high - found.low < unpaired


def test_paired_difference_knows_of_videos_and_of_seeds() -> None:
    rng = np.random.default_rng(0)
    hits, videos = clustered(rng, 60, 6)
    zeros = np.zeros_like(hits)

    def width(ours: np.ndarray, theirs: np.ndarray, clusters: list[int] | None) -> float:
        found = paired_difference(ours, theirs, clusters)
        return found.high - found.low

    assert width(hits, zeros, videos) > 1.3 * width(hits, zeros, None)
    single = estimate(hits, videos, 4000)
    assert width(hits, zeros, videos) == pytest.approx(single.high - single.low, abs=0.01)
    # Seeds that disagree widen the interval; three times the same seed does not.
    alike, unlike = np.stack([hits] * 3), np.stack([hits, hits * 0, hits * 0 + 1])
    assert width(alike, alike * 0, videos) == pytest.approx(width(hits, zeros, videos), abs=0.01)
    assert width(unlike, unlike * 0, videos) > 3 * width(hits, zeros, videos)


def test_paired_interval_covers_a_new_seed_and_new_videos() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(150):
        gain = 0.1 + 0.1 * rng.standard_normal((12, 1))  # of each seed
        gain = gain + 0.3 * np.repeat(rng.standard_normal((1, 40)), 3, axis=1)  # of each video
        videos = np.repeat(np.arange(40), 3).tolist()
        found = paired_difference(gain, np.zeros((12, 120)), videos, resamples=300)
        covered += found.low <= 0.1 <= found.high
    assert 0.87 <= covered / 150 <= 0.99


def test_with_three_seeds_the_interval_covers_a_little_less_often_than_it_says() -> None:
    """Three are what the record has: a bootstrap cannot reach beyond the worst and the best of them."""
    rng = np.random.default_rng(6)
    covered = {
        0.0: 0,
        0.04: 0,
        0.08: 0,
    }  # by how far seeds lie apart (a standard deviation of accuracy)
    true = np.clip(0.6 + 0.25 * rng.standard_normal(1_000_000), 0, 1).mean()
    for spread in covered:
        for _ in range(150):
            share = 0.6 + spread * rng.standard_normal((3, 1))
            ease = 0.25 * rng.standard_normal(400)  # of each question
            hits = rng.random((3, 400)) < np.clip(share + ease, 0, 1)
            found = paired_difference(hits, np.zeros((3, 400)), resamples=400)
            covered[spread] += found.low <= true <= found.high
    assert 0.9 <= covered[0.0] / 150 <= 1
    assert 0.86 <= covered[0.04] / 150 <= 0.98
    assert 0.75 <= covered[0.08] / 150 <= 0.95


def test_an_estimate_is_of_values_with_a_cluster_each() -> None:
    found = estimate([1, 0, 1, 1], ["a", "a", "b", "b"])
    assert (found.mean, found.n) == (0.75, 4) and found.low == 0.5 and found.high == 1
    assert -found == Estimate(-0.75, -1, -0.5, 4) and str((-Estimate(0, 0, 0, 1)).mean) == "0.0"
    for values, clusters in (([], []), ([], None), ([1, 0], ["a"])):
        with pytest.raises(ValueError, match="values for"):
            estimate(values, clusters)
    seeds = mean_over_seeds([[1, 0, 1, 1], [1, 1, 1, 1]])
    assert (seeds.mean, seeds.n) == (0.875, 8)
    assert accuracy([True, None, False, True]) == 0.5 and np.isnan(accuracy([]))


def test_only_right_counts_discordant_rows() -> None:
    assert only_right([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]) == (2, 1)


def test_ten_thousand_rows_are_quick() -> None:
    rng = np.random.default_rng(0)
    hits, members = rng.random(10_000) < 0.5, rng.random((10_000, 30)) < 0.1
    began = time.process_time()
    category_estimates(hits, members, (np.arange(10_000) // 3).tolist(), 2000)
    assert time.process_time() - began < 8
