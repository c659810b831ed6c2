import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from videogru.errors import DataError
from videogru.inference.evaluation import evaluate
from videogru.inference.predictions import Predictions, read_csv


def make(count: int, num_classes: int, *, failed: int = 0, unlabeled: int = 0) -> Predictions:
    rng = np.random.default_rng(count)
    labels = rng.integers(num_classes, size=count)
    logits = rng.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += 1
    odds = np.exp(logits)
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    errors = np.array([""] * count, dtype="U40")
    errors[:failed] = "truncated"
    probabilities[:failed] = np.nan
    labels[failed : failed + unlabeled] = -1
    return Predictions(
        classes=tuple(f"c{k}" for k in range(num_classes)),
        sources=np.array([f"s{i}" for i in range(count)]),
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        errors=errors,
        rows=np.arange(count),
    )


def test_failed_and_unlabeled_rows_are_counted_and_left_out() -> None:
    predictions = make(60, 3, failed=4, unlabeled=6)
    found = evaluate(predictions, resamples=20)
    assert (found.total, found.evaluated, found.failed, found.unlabeled) == (60, 50, 4, 6)
    kept = slice(10, None)
    right = predictions.probabilities[kept].argmax(axis=1) == predictions.labels[kept]
    assert found.metrics["top1"].value == pytest.approx(right.mean())
    assert found.confusion.sum() == 50


@pytest.mark.parametrize("num_classes", [2, 5])
def test_tables_agree_with_scikit_learn(num_classes: int) -> None:
    predictions = make(120, num_classes)
    found = evaluate(predictions, resamples=5)
    names = range(num_classes)
    expected = sk.precision_recall_fscore_support(predictions.labels, predictions.predicted, labels=names)
    for k, row in enumerate(found.per_class):
        assert [row.precision, row.recall, row.f1, row.support] == pytest.approx([column[k] for column in expected])
        area = sk.roc_auc_score(predictions.labels == k, predictions.probabilities[:, k])
        assert row.auroc == pytest.approx(area)
    np.testing.assert_array_equal(found.confusion, sk.confusion_matrix(predictions.labels, predictions.predicted))
    assert (found.roc is None) == (num_classes != 2)
    if found.roc:
        area = sk.auc(found.roc.false_positive_rate, found.roc.true_positive_rate)
        assert area == pytest.approx(found.metrics["auroc"].value)


def test_calibration_bins_add_up_to_the_error() -> None:
    found = evaluate(make(200, 4), resamples=5)
    assert sum(b.count for b in found.calibration) == 200
    full = [b for b in found.calibration if b.count]
    assert all(b.low < b.confidence <= b.high for b in full)
    assert all(math.isnan(b.accuracy) for b in found.calibration if not b.count)
    error = sum(b.count / 200 * abs(b.accuracy - b.confidence) for b in full)
    assert error == pytest.approx(found.metrics["ece"].value)


def test_a_class_never_seen_nor_predicted_has_no_scores(tmp_path: Path) -> None:
    predictions = replace(
        make(4, 3), labels=np.array([0, 0, 1, 1]), probabilities=np.array([[0.8, 0.2, 0.0]] * 2 + [[0.1, 0.9, 0.0]] * 2)
    )
    found = evaluate(predictions, resamples=5)
    absent = found.per_class[2]
    assert all(math.isnan(value) for value in (absent.precision, absent.recall, absent.f1, absent.auroc))
    found.to_json(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["per_class"][2]["f1"] is None


def test_nothing_labeled_is_an_error() -> None:
    with pytest.raises(DataError, match=r"10 rows 0 have a label and 0 failed"):
        evaluate(make(10, 2, unlabeled=10))
    with pytest.raises(DataError, match=r"10 rows 10 have a label and 10 failed"):
        evaluate(make(10, 2, failed=10))


def test_json_keeps_every_number(tmp_path: Path) -> None:
    found = evaluate(make(50, 2, failed=1), resamples=20)
    found.to_json(tmp_path / "metrics.json")
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["metrics"]["auroc"]["low"] == found.metrics["auroc"].low
    assert read["confusion"] == found.confusion.tolist()
    assert (read["total"], read["failed"], read["classes"]) == (50, 1, ["c0", "c1"])
    assert found.roc is not None
    assert found.roc.threshold[0] == math.inf
    assert read["roc"]["threshold"] == [None, *found.roc.threshold[1:]]


def test_the_csv_gives_the_same_evaluation(tmp_path: Path) -> None:
    predictions = make(80, 6, failed=2, unlabeled=3)
    predictions.write_csv(tmp_path / "p.csv")
    before, after = evaluate(predictions, resamples=30), evaluate(read_csv(tmp_path / "p.csv"), resamples=30)
    np.testing.assert_array_equal(before.confusion, after.confusion)
    for name, interval in before.metrics.items():
        again = after.metrics[name]
        assert (again.value, again.low, again.high) == pytest.approx(
            (interval.value, interval.low, interval.high), rel=1e-4
        )


def test_summary_rows_are_the_metrics_as_text() -> None:
    found = evaluate(make(80, 6), resamples=30)
    rows = {name: (value, between) for name, value, between in found.summary_rows()}
    top1 = found.metrics["top1"]
    assert rows["Accuracy"] == (f"{top1.value:.3f}", f"{top1.low:.3f} to {top1.high:.3f}")
    assert len(rows) == len(found.metrics) == 7
    one_class = replace(make(5, 2), labels=np.zeros(5, dtype=np.int64))
    rows = {name: (value, between) for name, value, between in evaluate(one_class, resamples=3).summary_rows()}
    assert rows["AUROC"] == ("–", "undefined")


def test_the_majority_class_is_named() -> None:
    predictions = replace(make(10, 3), labels=np.array([2] * 6 + [0] * 4))
    assert evaluate(predictions, resamples=3).majority == ("c2", 0.6)
