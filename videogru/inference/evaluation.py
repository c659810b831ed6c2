"""From predictions to the numbers of a report: metrics with intervals, per-class table, confusions, curves."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from videogru.errors import DataError
from videogru.files import atomic_text
from videogru.inference.metrics import (
    CALIBRATION_BINS,
    Interval,
    auroc_resamples,
    calibration_bin,
    class_auroc,
    compute_metrics,
    confusion_matrix,
    roc_points,
)
from videogru.inference.predictions import Predictions

METRIC_NAMES = {
    "auroc": "AUROC",
    "top1": "Accuracy",
    "top5": "Top-5 accuracy",
    "mean_class_accuracy": "Mean-class accuracy",
    "macro_f1": "Macro F1",
    "ece": "Calibration error",
    "nll": "Log loss",
}


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class: true samples, predictions of it, and its scores in 0..1 (NaN where nothing defines them)."""

    name: str
    support: int
    predicted: int
    precision: float
    recall: float
    f1: float
    auroc: float


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Samples with confidence in (low, high]: how many, their mean confidence and their accuracy (NaN if none)."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Roc:
    """ROC of class 1 of two: rates in 0..1 and the score from which a sample is called positive, from (0, 0) up."""

    false_positive_rate: tuple[float, ...]
    true_positive_rate: tuple[float, ...]
    threshold: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Everything measured on the labeled, readable rows; `total` = `evaluated` + `failed` + `unlabeled`.

    failed: the source could not be read (labeled or not); unlabeled: read, but its class is not known.
    confusion: (K K) int64 counts, rows true, columns predicted; roc: only for two classes that both occur.
    """

    classes: tuple[str, ...]
    total: int
    evaluated: int
    failed: int
    unlabeled: int
    resamples: int
    auroc_resamples: int
    seed: int
    metrics: dict[str, Interval]
    per_class: tuple[ClassRow, ...]
    confusion: Int64[np.ndarray, "K K"]
    roc: Roc | None
    calibration: tuple[CalibrationBin, ...]

    @property
    def majority(self) -> tuple[str, float]:
        """The most frequent true class and its share: the accuracy of always naming it."""
        support = self.confusion.sum(axis=1)
        most = int(np.argmax(support))
        return self.classes[most], float(support[most] / self.evaluated)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinity become None."""
        content = {name: getattr(self, name) for name in ("classes", "total", "evaluated", "failed", "unlabeled")}
        content |= {"resamples": self.resamples, "auroc_resamples": self.auroc_resamples, "seed": self.seed}
        content["metrics"] = {name: asdict(interval) for name, interval in self.metrics.items()}
        content["per_class"] = [asdict(row) for row in self.per_class]
        content["confusion"] = self.confusion.tolist()
        content["roc"] = None if self.roc is None else asdict(self.roc)
        content["calibration"] = [asdict(calibration) for calibration in self.calibration]
        plain: dict[str, Any] = _finite(content)
        return plain

    def to_json(self, path: Path) -> None:
        """Write `to_dict()` as JSON, all of it or nothing. Raises DataError where it cannot be written."""
        with atomic_text(path) as file:
            json.dump(self.to_dict(), file, ensure_ascii=False, allow_nan=False)
            file.write("\n")

    def summary_rows(self) -> list[tuple[str, str, str]]:
        """(name, value, 95 % interval) of each metric, as text for a terminal table."""
        rows = []
        for key, name in METRIC_NAMES.items():
            if key in self.metrics:
                interval = self.metrics[key]
                known = not math.isnan(interval.low)
                between = f"{interval.low:.3f} to {interval.high:.3f}" if known else "undefined"
                rows.append((name, number_text(interval.value), between))
        return rows


def number_text(value: float) -> str:
    """Three decimals, or a dash where there is no value."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def usable_rows(predictions: Predictions) -> Bool[np.ndarray, " N"]:
    """(N,) the rows that can be judged: labeled, and read without error."""
    return np.asarray((predictions.labels >= 0) & ~predictions.failed)


def evaluate(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> Evaluation:
    """Judge the predictions on the rows that have a label and did not fail; the others are counted.

    Raises DataError where no such row is left.
    """
    usable = usable_rows(predictions)
    failed = int(predictions.failed.sum())
    if not usable.any():
        labeled = int((predictions.labels >= 0).sum())
        raise DataError(
            f"nothing to evaluate: of {len(predictions)} rows {labeled} have a label and {failed} failed",
            hint="Give a manifest whose label column holds the model's class names: " + _some(predictions.classes),
        )
    labels, predicted = predictions.labels[usable], predictions.predicted[usable]
    probabilities = predictions.probabilities[usable].astype(np.float64)
    confusion = confusion_matrix(labels, predicted, len(predictions.classes))
    roc = None
    if len(predictions.classes) == 2 and len(np.unique(labels)) == 2:
        roc = Roc(*(tuple(points.tolist()) for points in roc_points(probabilities[:, 1], labels == 1)))
    count = len(labels)
    return Evaluation(
        classes=predictions.classes,
        total=len(predictions),
        evaluated=count,
        failed=failed,
        unlabeled=len(predictions) - count - failed,
        resamples=resamples,
        auroc_resamples=auroc_resamples(count, len(predictions.classes), resamples),
        seed=seed,
        metrics=compute_metrics(probabilities, labels, resamples=resamples, seed=seed),
        per_class=_per_class(predictions.classes, confusion, class_auroc(probabilities, labels).tolist()),
        confusion=confusion,
        roc=roc,
        calibration=_calibration(predictions.confidence[usable].astype(np.float64), labels == predicted),
    )


def _per_class(
    classes: tuple[str, ...], confusion: Int64[np.ndarray, "K K"], auroc: list[float]
) -> tuple[ClassRow, ...]:
    rows = []
    for k, name in enumerate(classes):
        hits, support, predicted = int(confusion[k, k]), int(confusion[k].sum()), int(confusion[:, k].sum())
        f1 = _ratio(2 * hits, support + predicted)
        row = ClassRow(name, support, predicted, _ratio(hits, predicted), _ratio(hits, support), f1, auroc[k])
        rows.append(row)
    return tuple(rows)


def _calibration(confidence: np.ndarray, right: np.ndarray) -> tuple[CalibrationBin, ...]:
    bins = calibration_bin(confidence)
    found = []
    for m in range(CALIBRATION_BINS):
        inside = bins == m
        count = int(inside.sum())
        mean, accuracy = _ratio(float(confidence[inside].sum()), count), _ratio(int(right[inside].sum()), count)
        found.append(CalibrationBin(m / CALIBRATION_BINS, (m + 1) / CALIBRATION_BINS, count, mean, accuracy))
    return tuple(found)


def _ratio(above: float | int, below: int) -> float:
    return above / below if below else float("nan")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
