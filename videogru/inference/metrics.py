"""Metrics of a classifier, with percentile bootstrap intervals, vectorized over the resamples.

A resample (N draws with replacement) is kept as counts: how often each sample was drawn. Every metric is a function
of such counts, (N R) for R resamples at once; the point value is the same function with all counts 1.

Where a class has no sample: mean-class accuracy averages the classes that have a label, macro F1 those that have a
label or a prediction (scikit-learn's rule), AUROC those that have both positives and negatives. In a resample the
same rules hold for the resample. A resample in which AUROC is undefined does not count for its interval.
Samples are taken as independent: where many come from one patient or recording, the intervals are too narrow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Shaped

CALIBRATION_BINS = 15
LEVEL = 0.95
CHUNK = 4_000_000  # counts held at once, float32
AUROC_BUDGET = 1_000_000_000  # samples x classes x resamples: some 10 s of one core
SMALLEST = float(np.finfo(np.float64).eps)  # a probability of 0 costs log(SMALLEST), as in scikit-learn


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13); NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """What the metrics need of N samples: labels, predictions, and by-products of their probabilities."""

    num_classes: int
    labels: Int64[np.ndarray, " N"]
    predicted: Int64[np.ndarray, " N"]
    in_top5: Shaped[np.ndarray, " N"]
    bins: Int64[np.ndarray, " N"]
    gaps: Float64[np.ndarray, " N"]  # confidence minus correctness
    losses: Float64[np.ndarray, " N"]


@dataclass(frozen=True, slots=True, eq=False)
class _Ranking:
    """One class against the rest: positives, negatives by rising score, and how many of these lie below each positive.

    left counts the negatives strictly below, right those not above; their mean is the midrank that ties need.
    """

    positives: Int64[np.ndarray, " P"]
    negatives: Int64[np.ndarray, " M"]
    left: Int64[np.ndarray, " P"]
    right: Int64[np.ndarray, " P"]


def compute_metrics(
    probabilities: Float[np.ndarray, "N K"], labels: Int64[np.ndarray, " N"], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """All metrics of N >= 1 labeled samples, each with its 95 % interval from `resamples` seeded resamples.

    top1, top5 (only for more than 5 classes), mean_class_accuracy (balanced accuracy), macro_f1, auroc (two classes:
    of class 1; more: macro one-vs-rest), ece (expected calibration error of the top-1 confidence, 15 bins of equal
    width; Guo et al. 2017, eq. 3) and nll (mean negative log likelihood in nats).
    The interval of auroc uses the first `auroc_resamples(...)` of the resamples. ece is never negative, so its
    resampled values lie higher on average; the value may lie below its interval.
    Raises ValueError where there is no sample, a label is unknown or resamples < 1.
    """
    count, num_classes = probabilities.shape
    if resamples < 1:
        raise ValueError("an interval needs at least one resample")
    if count == 0 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError("metrics need at least one sample, and labels in 0..K-1")
    exact = probabilities.astype(np.float64)
    samples = _prepare(exact, labels)
    classes = [1] if num_classes == 2 else list(range(num_classes))
    rankings = [_rank(exact[:, k], labels == k) for k in classes]

    one = np.ones((count, 1), dtype=np.float32)
    values = _weighted_values(samples, one) | {"auroc": _macro_auroc(rankings, one)}
    with_auroc = auroc_resamples(count, num_classes, resamples)
    drawn: dict[str, list[Float64[np.ndarray, " R"]]] = {name: [] for name in values}
    done = 0
    for counts in resample_counts(count, resamples=resamples, seed=seed):
        for name, scores in _weighted_values(samples, counts).items():
            drawn[name].append(scores)
        ranked = counts[:, : max(with_auroc - done, 0)]
        if ranked.shape[1]:
            drawn["auroc"].append(_macro_auroc(rankings, np.ascontiguousarray(ranked)))
        done += counts.shape[1]
    return {name: interval(float(values[name][0]), np.concatenate(drawn[name])) for name in values}


def paired_difference(
    changed: Float[np.ndarray, "N K"],
    plain: Float[np.ndarray, "N K"],
    labels: Int64[np.ndarray, " N"],
    *,
    metric: Literal["auroc", "top1"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[str, Interval, Interval]:
    """(metric, its value for `changed`, value of `changed` minus value of `plain`) on the same N >= 1 labeled samples.

    Unless a metric is named, it is auroc for two classes that both occur, else top1. Both are resampled together, so
    that the interval of the difference is that of pairs.
    """
    if metric is None:
        metric = "auroc" if plain.shape[1] == 2 and len(np.unique(labels)) == 2 else "top1"

    def values(probabilities: Float64[np.ndarray, "N K"], counts: Float32[np.ndarray, "N R"]) -> np.ndarray:
        if metric == "auroc":
            return _auroc(_rank(probabilities[:, 1], labels == 1), counts)
        return np.asarray((probabilities.argmax(axis=1) == labels) @ counts.astype(np.float64) / counts.sum(axis=0))

    exact = [probabilities.astype(np.float64) for probabilities in (changed, plain)]
    own, base = (float(values(p, np.ones((len(labels), 1), np.float32))[0]) for p in exact)
    drawn = [
        np.stack([values(p, counts) for p in exact])
        for counts in resample_counts(len(labels), resamples=resamples, seed=seed)
    ]
    mine, theirs = np.concatenate(drawn, axis=1)
    return metric, interval(own, mine), interval(own - base, mine - theirs)


def auroc_resamples(count: int, num_classes: int, resamples: int = 1000) -> int:
    """How many of the resamples AUROC's interval uses: all, or as many as AUROC_BUDGET pays for, but at least 100."""
    ranked = 1 if num_classes == 2 else num_classes
    return min(resamples, max(100, AUROC_BUDGET // max(count * ranked, 1)))


def resample_counts(count: int, *, resamples: int, seed: int) -> Iterator[Float32[np.ndarray, "N R"]]:
    """How often each of N samples is drawn in each resample, some resamples at a time.

    Resample r is row r of `numpy.random.default_rng(seed).integers(N, size=(resamples, N))`, however it is cut.
    """
    rng = np.random.default_rng(seed)
    width = max(1, min(resamples, CHUNK // count))
    for start in range(0, resamples, width):
        some = min(width, resamples - start)
        indices = rng.integers(count, size=(some, count))
        cells = indices * some + np.arange(some)[:, None]
        yield np.bincount(cells.ravel(), minlength=count * some).reshape(count, some).astype(np.float32)


def class_auroc(probabilities: Float[np.ndarray, "N K"], labels: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, " K"]:
    """(K,) area under the ROC of each class against the rest, ties by midranks; NaN where a side has no sample."""
    one = np.ones((len(labels), 1), dtype=np.float32)
    exact = probabilities.astype(np.float64)
    return np.array([_auroc(_rank(exact[:, k], labels == k), one)[0] for k in range(exact.shape[1])], dtype=np.float64)


def confusion_matrix(
    labels: Int64[np.ndarray, " N"], predicted: Int64[np.ndarray, " N"], num_classes: int
) -> Int64[np.ndarray, "K K"]:
    """(K K) counts; rows are true classes, columns predicted ones."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def roc_points(
    scores: Float[np.ndarray, " N"], positive: Shaped[np.ndarray, " N"]
) -> tuple[Float64[np.ndarray, " Q"], Float64[np.ndarray, " Q"], Float64[np.ndarray, " Q"]]:
    """False positive rates, true positive rates and thresholds from (0, 0) up; points on a straight line are dropped.

    The first threshold is infinite. Raises ValueError where there is no positive or no negative.
    """
    hits, misses = int(positive.sum()), int((~positive).sum())
    if not hits or not misses:
        raise ValueError("a ROC curve needs positives and negatives")
    order = np.argsort(-scores, kind="stable")
    falling = scores[order].astype(np.float64)
    last = np.append(np.flatnonzero(np.diff(falling)), len(falling) - 1)  # the end of each run of equal scores
    true = np.concatenate([[0], np.cumsum(positive[order])[last]])
    false = np.concatenate([[0], last + 1]) - true
    corner = np.ones(len(true), dtype=np.bool_)
    # Cross product of the steps before and after: 0 on a straight line.
    corner[1:-1] = np.diff(true)[:-1] * np.diff(false)[1:] != np.diff(true)[1:] * np.diff(false)[:-1]
    thresholds = np.concatenate([[np.inf], falling[last]])
    return (false / misses)[corner], (true / hits)[corner], thresholds[corner]


def calibration_bin(confidence: Float[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """(N,) bin m of 0..14 for confidences in (m / 15, (m + 1) / 15]; Guo et al. 2017, section 2."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.searchsorted(edges, confidence.astype(np.float64), side="left") - 1
    return np.clip(bins, 0, CALIBRATION_BINS - 1).astype(np.int64)


def _prepare(probabilities: Float64[np.ndarray, "N K"], labels: Int64[np.ndarray, " N"]) -> _Samples:
    predicted = np.argmax(probabilities, axis=1).astype(np.int64)
    confidence = probabilities.max(axis=1)
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)
    # Among equals the first class ranks first, as in argmax.
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & earlier)).sum(axis=1)
    return _Samples(
        num_classes=probabilities.shape[1],
        labels=labels,
        predicted=predicted,
        in_top5=rank < 5,
        bins=calibration_bin(confidence),
        gaps=confidence - (predicted == labels),
        losses=-np.log(np.clip(own[:, 0], SMALLEST, 1.0)),
    )


def _weighted_values(samples: _Samples, counts: Float32[np.ndarray, "N R"]) -> dict[str, Float64[np.ndarray, " R"]]:
    """Every metric but auroc for each column of counts."""
    size, K = counts.sum(axis=0, dtype=np.float64), samples.num_classes
    right = np.flatnonzero(samples.predicted == samples.labels)
    hits = _sums_by(samples.labels[right], counts[right], K)
    support = _sums_by(samples.labels, counts, K)
    named = _sums_by(samples.predicted, counts, K)
    values = {"top1": hits.sum(axis=0) / size}
    if K > 5:
        values["top5"] = counts[samples.in_top5].sum(axis=0, dtype=np.float64) / size
    values["mean_class_accuracy"] = _mean_of_ratios(hits, support)
    values["macro_f1"] = _mean_of_ratios(2 * hits, support + named)
    gaps = _sums_by(samples.bins, counts * samples.gaps[:, None], CALIBRATION_BINS)
    values["ece"] = np.abs(gaps).sum(axis=0) / size
    values["nll"] = samples.losses @ counts / size
    return values


def _sums_by(
    groups: Int64[np.ndarray, " M"], columns: Float[np.ndarray, "M R"], num_groups: int
) -> Float64[np.ndarray, "G R"]:
    """Sum the rows of each group."""
    sums = np.zeros((num_groups, columns.shape[1]))
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    if len(present):
        sums[present] = np.add.reduceat(columns[order], starts, axis=0)
    return sums


def _mean_of_ratios(above: Float64[np.ndarray, "G R"], below: Float64[np.ndarray, "G R"]) -> Float64[np.ndarray, " R"]:
    """Mean over the groups whose denominator is not 0; NaN where there is none."""
    valid = below > 0
    ratios = np.divide(above, below, out=np.zeros_like(above), where=valid)
    present = valid.sum(axis=0)
    return np.asarray(np.divide(ratios.sum(axis=0), present, out=np.full(len(present), np.nan), where=present > 0))


def _rank(scores: Float64[np.ndarray, " N"], positive: Shaped[np.ndarray, " N"]) -> _Ranking:
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    rising = scores[negatives]
    left = np.searchsorted(rising, scores[positives], side="left")
    right = np.searchsorted(rising, scores[positives], side="right")
    return _Ranking(positives, negatives, left, right)


def _auroc(ranking: _Ranking, counts: Float32[np.ndarray, "N R"]) -> Float64[np.ndarray, " R"]:
    """Mann-Whitney: the share of (positive, negative) pairs in the right order, a tie counting half."""
    total = len(ranking.negatives)
    undefined = np.full(counts.shape[1], np.nan)
    if not total or not len(ranking.positives):
        return undefined
    # Negatives need adding up only between the places where some positive stands.
    starts = np.union1d([0], np.concatenate([ranking.left, ranking.right]))
    starts = starts[starts < total].astype(np.int64)
    between = np.add.reduceat(counts[ranking.negatives], starts, axis=0)
    below = np.concatenate([np.zeros((1, counts.shape[1])), np.cumsum(between, axis=0, dtype=np.float64)])
    places = np.append(starts, total)
    drawn = counts[ranking.positives]
    wins = below[np.searchsorted(places, ranking.left)] + below[np.searchsorted(places, ranking.right)]
    pairs = drawn.sum(axis=0, dtype=np.float64) * below[-1]
    return np.asarray(np.divide((drawn * wins).sum(axis=0) / 2, pairs, out=undefined, where=pairs > 0))


def _macro_auroc(rankings: list[_Ranking], counts: Float32[np.ndarray, "N R"]) -> Float64[np.ndarray, " R"]:
    each = np.stack([_auroc(ranking, counts) for ranking in rankings])
    valid = ~np.isnan(each)
    return _mean_of_ratios(np.where(valid, each, 0.0), valid.astype(np.float64))


def interval(value: float, drawn: Float64[np.ndarray, " R"]) -> Interval:
    """The value with the middle 95 % of its resampled values; NaN where the value or all of these are."""
    finite = drawn[np.isfinite(drawn)]
    if not len(finite) or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
