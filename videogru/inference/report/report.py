"""The report of a run: one HTML page that needs nothing else, for any screen, dark or light, and for paper."""

import base64
import csv
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from jaxtyping import Int64, UInt8
from markupsafe import Markup

from videogru.errors import DataError, SourceError
from videogru.files import atomic_text
from videogru.inference.evaluation import METRIC_NAMES, Evaluation, number_text, usable_rows
from videogru.inference.predictions import Predictions
from videogru.inference.report.figures import (
    FIRST,
    SECOND,
    confusion_picture,
    curve_series,
    line_chart,
    reliability_chart,
    roc_chart,
    strip_pictures,
)

Strips = Callable[[int], UInt8[np.ndarray, "T H W 3"] | None]

MAX_EXAMPLES = 6
MAX_MATRIX = 12  # classes up to which the matrix is a table with numbers
MAX_PAIRS = 20
MAX_FAILED = 200


@dataclass(frozen=True, slots=True)
class _Tile:
    name: str
    value: str
    low: float  # NaN where there is no interval
    high: float
    place: float | None  # of the value on a scale 0..1, None for unbounded metrics
    note: str


@dataclass(frozen=True, slots=True)
class _Example:
    source: str
    label: str
    predicted: str
    probability: str
    pictures: list[str]
    missing: str  # why there is no picture


def read_curves(path: Path) -> list[dict[str, float]]:
    """The rows of Lightning's metrics.csv (epoch, step, train_loss, ...), each without its blank cells.

    Any columns may be absent. Raises DataError on a missing file or a cell that is no number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in reader]
    except OSError as error:
        raise DataError(f"cannot read the training log: {error.strerror}", where=path) from error
    except (ValueError, TypeError, csv.Error) as error:
        raise DataError(f"not a training log: {error}", where=f"{path}:{reader.line_num}") from error
    return [row for row in rows if row]


def write_report(
    run: Path,
    *,
    title: str,
    evaluation: Evaluation,
    predictions: Predictions,
    curves: Sequence[Mapping[str, float]],
    config_yaml: str,
    strips: Strips,
    facts: Mapping[str, str],
    commands: Sequence[str],
    step_name: str = "frames",
) -> Path:
    """Write run/report.html, one page without outside resources, and return its path.

    evaluation: of these predictions; curves: as `read_curves` gives them, may be empty; strips(i): what the model saw
    of row i of the predictions (0 the first), (T H W 3) uint8, or None where there is nothing to show; it is called for
    the shown examples only, and a SourceError it raises is shown in place of the picture. facts: lines on the model, in
    order; commands: the exact command lines that repeat the run; step_name: frames, slices or rows.
    All text is escaped. Raises DataError where the page cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number_text
    environment.filters["script_hash"] = _script_hash
    right, wrong = extreme_rows(predictions)
    path = run / "report.html"
    big = len(evaluation.classes) > MAX_MATRIX
    failures = np.flatnonzero(predictions.failed)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        evaluation=evaluation,
        tiles=_tiles(evaluation),
        facts=facts,
        commands=commands,
        charts=_charts(evaluation, curves),
        matrix=None if big else _matrix(evaluation.confusion),
        matrix_picture=confusion_picture(evaluation.confusion) if big else None,
        pairs=confused_pairs(evaluation) if big else [],
        examples=[
            ("Confidently right", "right", [_example(predictions, i, strips) for i in right.tolist()]),
            ("Confidently wrong", "wrong", [_example(predictions, i, strips) for i in wrong.tolist()]),
        ],
        failures=[(str(predictions.sources[i]), str(predictions.errors[i])) for i in failures[:MAX_FAILED]],
        more_failures=max(0, len(failures) - MAX_FAILED),
        config_yaml=config_yaml,
        step_name=step_name,
    )
    with atomic_text(path) as file:
        file.write(page)
    return path


def extreme_rows(predictions: Predictions) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " Q"]]:
    """At most 6 rows each: the most confident of the right predictions, and of the wrong ones."""
    usable = usable_rows(predictions)
    right = predictions.predicted == predictions.labels
    falling = np.argsort(-predictions.confidence, kind="stable")
    chosen = [falling[(usable & kind)[falling]][:MAX_EXAMPLES].astype(np.int64) for kind in (right, ~right)]
    return chosen[0], chosen[1]


def confused_pairs(evaluation: Evaluation) -> list[tuple[str, str, int, float]]:
    """The (true, predicted) pairs of different classes with most samples: names, samples, share of the true class."""
    wrong = evaluation.confusion.copy()
    np.fill_diagonal(wrong, 0)
    support = evaluation.confusion.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    found = []
    for cell in order.tolist():
        true, predicted = divmod(cell, len(wrong))
        count = int(wrong[true, predicted])
        if count:
            share = count / int(support[true])
            found.append((evaluation.classes[true], evaluation.classes[predicted], count, share))
    return found


def _tiles(evaluation: Evaluation) -> list[_Tile]:
    name, share = evaluation.majority
    binary = len(evaluation.classes) == 2
    notes = {
        "auroc": f"of class {evaluation.classes[1]}" if binary else "mean over classes, each against the rest",
        "top1": f"always saying {name} gives {share:.3f}",
        "top5": f"chance: {min(1.0, 5 / len(evaluation.classes)):.3f}",
        "mean_class_accuracy": f"chance: {1 / len(evaluation.classes):.3f}",
        "macro_f1": "mean over classes",
        "ece": "confidence against accuracy; 0 is best",
        "nll": f"in nats; knowing nothing costs {math.log(len(evaluation.classes)):.3f}",
    }
    tiles = []
    # With few classes accuracy flatters; with many it is what people compare.
    order = list(METRIC_NAMES) if binary else ["top1", "top5", "auroc", *METRIC_NAMES]
    for key in dict.fromkeys(order):
        if key in evaluation.metrics:
            interval = evaluation.metrics[key]
            bounded = key != "nll" and not math.isnan(interval.value)
            place = interval.value if bounded else None
            text = number_text(interval.value)
            tiles.append(_Tile(METRIC_NAMES[key], text, interval.low, interval.high, place, notes[key]))
    return tiles


def _charts(evaluation: Evaluation, curves: Sequence[Mapping[str, float]]) -> dict[str, list[Markup]]:
    loss = curve_series(curves, {"train_loss": ("train", FIRST), "val_loss": ("validation", SECOND)})
    accuracy = curve_series(curves, {"train_accuracy": ("train", FIRST), "val_accuracy": ("validation", SECOND)})
    auroc = curve_series(curves, {"val_auroc": ("validation", SECOND)})
    training = [line_chart(loss, title="Loss", x_label="Epoch", unit_range=False)] if loss else []
    for title, series in (("Accuracy", accuracy), ("AUROC, validation", auroc)):
        if series:
            training.append(line_chart(series, title=title, x_label="Epoch", unit_range=True))
    judged = []
    if evaluation.roc is not None:
        judged.append(roc_chart(evaluation.roc, number_text(evaluation.metrics["auroc"].value)))
    judged.append(reliability_chart(evaluation.calibration, number_text(evaluation.metrics["ece"].value)))
    return {"training": training, "judged": judged}


def _matrix(confusion: Int64[np.ndarray, "K K"]) -> list[list[tuple[int, float]]]:
    """Count and share of the true class for each cell."""
    support = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shares = (confusion / support).tolist()
    return [list(zip(*pair, strict=True)) for pair in zip(confusion.tolist(), shares, strict=True)]


def _example(predictions: Predictions, i: int, strips: Strips) -> _Example:
    missing, frames = "no picture", None
    try:
        frames = strips(i)
    except SourceError as error:
        missing = str(error)
    confidence = float(predictions.confidence[i])
    return _Example(
        source=str(predictions.sources[i]),
        label=predictions.classes[int(predictions.labels[i])],
        predicted=predictions.classes[int(predictions.predicted[i])],
        probability="> 0.999" if confidence >= 0.9995 else f"{confidence:.3f}",
        pictures=[] if frames is None else strip_pictures(frames),
        missing=missing,
    )


def _script_hash(script: str) -> str:
    """What a Content-Security-Policy wants to let this script run, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode("ascii")
