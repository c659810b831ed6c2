"""Intervals over seeds and images, in tools/experiments/article.py."""

import math

import numpy as np
import pytest

from tools.experiments import article


def test_resampled_means_by_a_loop() -> None:
    values = np.random.default_rng(3).random((2, 3, 7))
    means, drawn = article.resampled_means(values, resamples=5, seed=11)
    np.testing.assert_allclose(means, [values[0].mean(), values[1].mean()])
    images = np.random.default_rng(11).integers(7, size=(5, 7))
    seeds = np.random.default_rng((11, 1)).integers(3, size=(5, 2))
    for g in range(2):
        for r in range(5):
            expected = np.mean([values[g, s, n] for s in seeds[r] for n in images[r]])
            assert drawn[g, r] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("S", [1, 3, 5])
def test_resampled_means_have_the_analytic_spread(S: int) -> None:
    rng = np.random.default_rng(0)
    # Seeds and images that add up, so that the two parts of the variance are known.
    seeds, images = rng.normal(size=S), rng.normal(0, 20, size=400)
    means, drawn = article.resampled_means((seeds[:, None] + images)[None], resamples=8000)
    variance = (seeds.var(ddof=1) / S if S > 1 else 0.0) + images.var() / 400
    assert drawn.std() == pytest.approx(np.sqrt(variance), rel=0.03)
    assert drawn.mean() == pytest.approx(means[0], abs=0.05)


def test_differences_are_paired() -> None:
    base = np.random.default_rng(1).normal(size=(3, 50))
    _, drawn = article.resampled_means(np.stack([base, base + 0.25]), resamples=100)
    np.testing.assert_allclose(drawn[1] - drawn[0], 0.25, atol=1e-5)


def test_samples_are_all_then_seeds_then_resamples() -> None:
    values = np.random.default_rng(2).random((2, 3, 20)) < 0.5
    rows = article.samples(values)
    means, drawn = article.resampled_means(values)
    assert rows.shape == (2, 1 + 3 + article.RESAMPLES)
    np.testing.assert_allclose(rows[:, 0], means)
    np.testing.assert_allclose(rows[:, 1:4], [[seed.mean() for seed in net] for net in values])
    np.testing.assert_array_equal(rows[:, 4:], drawn)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 0.2, "the claim holds"), (-0.1, 0.2, "undecided"), (-0.2, -0.1, "the opposite")]
)
def test_verdicts(low: float, high: float, said: str) -> None:
    assert said in article.verdict({"value": 0.0, "low": low, "high": high})


def test_quantiles_of_t_hold_95_percent_of_its_density() -> None:
    for freedom, quantile in enumerate(article.T_QUANTILES, start=1):
        factor = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        x = np.linspace(-quantile, quantile, 20_001)
        density = factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=2e-5)


def test_one_seed_has_percentiles_alone() -> None:
    found = article.interval(np.concatenate([[0.5, 0.5], np.arange(1001.0)]), 1)
    assert found == {"value": 0.5, "low": 25.0, "high": 975.0, "over": "images alone"}
    assert article.points({**found, "low": 0.4, "high": 0.6}) == "50.0 (40.0 to 60.0, images alone)"


def test_the_wider_end_of_two_intervals_counts() -> None:
    drawn = np.linspace(0.0, 1.0, 1001)
    # Seeds 1, 2, 3: mean 2, sd 1; t with 2 degrees of freedom.
    half = 4.3027 / math.sqrt(3)
    seeds = article.interval(np.concatenate([[2.0, 1.0, 2.0, 3.0], drawn]), 3)
    assert (seeds["low"], seeds["high"]) == pytest.approx((2 - half, 2 + half))
    mixed = article.interval(np.concatenate([[2.0, 1.0, 2.0, 3.0], drawn - 10]), 3)
    assert (mixed["low"], mixed["high"]) == pytest.approx((-9.975, 2 + half))
    images = article.interval(np.concatenate([[0.5, 0.5, 0.5, 0.5, np.nan], drawn]), 3)
    assert (images["low"], images["high"], images["over"]) == (0.025, 0.975, "seeds and images")
    assert article.points(images, signed=True) == "+50.0 (+2.5 to +97.5)"
    # Beyond the table its last quantile.
    many = article.interval(np.concatenate([[0.0], np.tile([-1.0, 1.0], 8), np.zeros(50)]), 16)
    assert many["high"] == pytest.approx(2.2622 * math.sqrt(16 / 15) / 4)


@pytest.mark.parametrize(("seed_sd", "image_sd"), [(1.0, 0.1), (1.0, 10.0), (0.1, 10.0)])
def test_coverage_with_three_seeds(seed_sd: float, image_sd: float) -> None:
    """2000 experiments of true mean 0 with 100 images: seeds dominate, both count the same, images dominate."""
    G, S, N = 2000, 3, 100
    rng = np.random.default_rng(0)
    values = seed_sd * rng.normal(size=(G, S, 1)) + image_sd * rng.normal(size=(G, 1, N))
    values = values + 0.3 * image_sd * rng.normal(size=(G, S, N))
    rows = article.samples(values)
    found = [article.interval(row, S) for row in rows]
    coverage = np.mean([one["low"] <= 0 <= one["high"] for one in found])
    assert 0.93 <= coverage <= 0.99
    # The bootstrap alone, where the seeds dominate, is what the union mends.
    low, high = np.quantile(rows[:, 1 + S :], [0.025, 0.975], axis=1)
    alone = np.mean((low <= 0) & (high >= 0))
    assert (alone < 0.85) == (seed_sd / math.sqrt(S) > 2 * image_sd / math.sqrt(N))
