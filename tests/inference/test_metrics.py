import math
import time
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from videogru.inference import metrics as ours


def draw(count: int, num_classes: int, *, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=count)
    logits = rng.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += 1.2
    if ties:
        logits = np.round(logits)
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), labels


def by_loop(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of one resample by scikit-learn, or by hand where it has none."""
    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn remarks on predicted classes that have no label
        found = {
            "top1": sk.accuracy_score(labels, predicted),
            "mean_class_accuracy": sk.balanced_accuracy_score(labels, predicted),
            "macro_f1": sk.f1_score(labels, predicted, average="macro"),
            "nll": sk.log_loss(labels, probabilities, labels=range(num_classes)),
            "ece": ece_by_hand(probabilities, labels),
        }
    if num_classes > 5:
        found["top5"] = sk.top_k_accuracy_score(labels, probabilities, k=5, labels=range(num_classes))
    areas = []
    for k in [1] if num_classes == 2 else range(num_classes):
        if 0 < (labels == k).sum() < len(labels):
            areas.append(sk.roc_auc_score(labels == k, probabilities[:, k]))
    found["auroc"] = float(np.mean(areas)) if areas else math.nan
    return found


def ece_by_hand(probabilities: np.ndarray, labels: np.ndarray) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        bins.setdefault(math.ceil(confidence * 15), []).append((confidence, row.index(confidence) == label))
    error = 0.0
    for members in bins.values():
        accuracy = sum(right for _, right in members) / len(members)
        confidence = sum(sure for sure, _ in members) / len(members)
        error += len(members) / len(labels) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize(("count", "num_classes"), [(300, 2), (250, 4), (300, 9), (3, 8), (400, 40), (1, 2)])
def test_values_agree_with_scikit_learn(count: int, num_classes: int) -> None:
    probabilities, labels = draw(count, num_classes, seed=count)
    found = ours.compute_metrics(probabilities, labels, resamples=2)
    expected = by_loop(probabilities, labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("num_classes", [2, 4])
def test_ties_count_half(num_classes: int) -> None:
    probabilities, labels = draw(200, num_classes, ties=True)
    assert len(np.unique(probabilities[:, 1])) < 100
    found = ours.compute_metrics(probabilities, labels, resamples=2)
    for name, value in by_loop(probabilities, labels).items():
        assert found[name].value == pytest.approx(value, abs=1e-9), name
    expected = [sk.roc_auc_score(labels == k, probabilities[:, k]) for k in range(num_classes)]
    np.testing.assert_allclose(ours.class_auroc(probabilities, labels), expected, atol=1e-12)


def test_equal_scores_give_a_half() -> None:
    found = ours.compute_metrics(np.full((10, 2), 0.5), np.arange(10) % 2, resamples=50)
    assert (found["auroc"].value, found["auroc"].low, found["auroc"].high) == (0.5, 0.5, 0.5)
    assert found["nll"].value == pytest.approx(math.log(2))


def test_absent_classes_are_left_out() -> None:
    probabilities, labels = draw(120, 6, seed=5)
    kept = labels < 3
    probabilities, labels = probabilities[kept], labels[kept]
    found = ours.compute_metrics(probabilities, labels, resamples=2)
    for name, value in by_loop(probabilities, labels).items():
        assert found[name].value == pytest.approx(value, abs=1e-9), name
    assert np.isnan(ours.class_auroc(probabilities, labels)).tolist() == [False] * 3 + [True] * 3


def test_one_class_has_no_auroc() -> None:
    probabilities, _ = draw(30, 2)
    found = ours.compute_metrics(probabilities, np.ones(30, dtype=np.int64), resamples=20)
    assert math.isnan(found["auroc"].value)
    assert math.isnan(found["auroc"].low)
    assert not math.isnan(found["top1"].low)


@pytest.mark.parametrize(("count", "num_classes"), [(40, 2), (25, 7)])
def test_intervals_agree_with_a_plain_loop(count: int, num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, labels = draw(count, num_classes, seed=1, ties=num_classes == 2)
    monkeypatch.setattr(ours, "CHUNK", count * 7)  # so that the resamples come in several parts
    found = ours.compute_metrics(probabilities, labels, resamples=60, seed=11)
    drawn: dict[str, list[float]] = {name: [] for name in found}
    for indices in np.random.default_rng(11).integers(count, size=(60, count)):
        for name, value in by_loop(probabilities[indices], labels[indices]).items():
            drawn[name].append(value)
    for name, values in drawn.items():
        low, high = np.nanpercentile(values, [2.5, 97.5])
        assert found[name].low == pytest.approx(low, abs=1e-6), name
        assert found[name].high == pytest.approx(high, abs=1e-6), name


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        right = rng.random(150) < 0.7
        probabilities = np.where(right[:, None], [0.2, 0.8], [0.8, 0.2])
        found = ours.compute_metrics(probabilities, np.ones(150, dtype=np.int64), resamples=200, seed=trial)
        covered += found["top1"].low <= 0.7 <= found["top1"].high
    assert 180 <= covered <= 199  # 95 % of 200, give or take three standard errors


def test_the_seed_decides() -> None:
    probabilities, labels = draw(100, 3)
    first, again = (ours.compute_metrics(probabilities, labels, resamples=50, seed=4) for _ in range(2))
    assert first == again
    assert first != ours.compute_metrics(probabilities, labels, resamples=50, seed=5)


def test_a_budget_shortens_only_the_bootstrap_of_auroc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours.auroc_resamples(10_000, 100) == 1000
    assert ours.auroc_resamples(10_000_000, 400) == 100
    probabilities, labels = draw(50, 3)
    full = ours.compute_metrics(probabilities, labels, resamples=300)
    first = ours.compute_metrics(probabilities, labels, resamples=100)
    monkeypatch.setattr(ours, "AUROC_BUDGET", 1)
    short = ours.compute_metrics(probabilities, labels, resamples=300)
    assert short["auroc"] == first["auroc"] != full["auroc"]
    assert short["top1"] == full["top1"]


def test_bins_are_closed_above() -> None:
    confidence = np.array([0.0, 1e-9, 1 / 15, 0.0667, 0.5, 14 / 15, 1.0])
    assert ours.calibration_bin(confidence).tolist() == [0, 0, 0, 1, 7, 13, 14]


@pytest.mark.parametrize("ties", [False, True])
def test_roc_points_agree_with_scikit_learn(ties: bool) -> None:
    probabilities, labels = draw(150, 2, ties=ties)
    found = ours.roc_points(probabilities[:, 1], labels == 1)
    expected = sk.roc_curve(labels == 1, probabilities[:, 1], drop_intermediate=False)
    # The sum of both rates rises along the curve: every point of scikit-learn's lies on ours, and ours are among them.
    np.testing.assert_allclose(
        np.interp(expected[0] + expected[1], found[0] + found[1], found[0]), expected[0], atol=1e-12
    )
    points = [set(zip(*(np.round(column, 9).tolist() for column in curve), strict=True)) for curve in (found, expected)]
    assert points[0] < points[1]
    slopes = np.arctan2(np.diff(found[1]), np.diff(found[0]))
    assert (np.abs(np.diff(slopes)) > 1e-9).all()  # none lies between its neighbors


def test_confusion_agrees_with_scikit_learn() -> None:
    probabilities, labels = draw(90, 5)
    predicted = probabilities.argmax(axis=1)
    expected = sk.confusion_matrix(labels, predicted, labels=range(6))
    np.testing.assert_array_equal(ours.confusion_matrix(labels, predicted, 6), expected)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        ours.compute_metrics(np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
    with pytest.raises(ValueError, match="labels"):
        ours.compute_metrics(np.full((1, 2), 0.5), np.array([-1]))
    with pytest.raises(ValueError, match="resample"):
        ours.compute_metrics(np.full((1, 2), 0.5), np.array([0]), resamples=0)
    with pytest.raises(ValueError, match="positives and negatives"):
        ours.roc_points(np.array([0.5, 0.6]), np.array([True, True]))


@pytest.mark.slow
def test_ten_thousand_samples_of_a_hundred_classes_are_quick() -> None:
    probabilities, labels = draw(10_000, 100)
    start = time.process_time()
    found = ours.compute_metrics(probabilities, labels)
    assert time.process_time() - start < 20
    assert found["auroc"].low < found["auroc"].value < found["auroc"].high
