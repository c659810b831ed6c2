"""What a model said about each source, as columns, and the CSV file that keeps it."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from videogru.errors import DataError
from videogru.files import atomic_text

FIXED_COLUMNS = ("row", "source", "label", "predicted", "confidence", "error")
SUM_TOLERANCE = 1e-3  # softmax in bfloat16 sums to 1 within this


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """One row per source that was asked for, in the order of the manifest; it checks itself when it is made.

    classes: K different, non-empty names; sources: (N,) str; labels: (N,) int64, -1 where unknown; probabilities:
    (N K), each row sums to 1, or is NaN where the source failed; errors: (N,) str, the reason, '' where the source was
    read; rows: (N,) int64, the manifest row. Raises ValueError where these do not hold.
    """

    classes: tuple[str, ...]
    sources: Shaped[np.ndarray, " N"]
    labels: Int64[np.ndarray, " N"]
    probabilities: Float32[np.ndarray, "N K"] | Float64[np.ndarray, "N K"]
    errors: Shaped[np.ndarray, " N"]
    rows: Int64[np.ndarray, " N"]

    def __post_init__(self) -> None:
        count = len(self.sources)
        if len({len(self.labels), len(self.probabilities), len(self.errors), len(self.rows), count}) != 1:
            raise ValueError("the columns differ in length")
        if not self.classes or "" in self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError("class names must be non-empty and different")
        if self.probabilities.shape != (count, len(self.classes)):
            raise ValueError(f"probabilities {self.probabilities.shape} for {count} rows, {len(self.classes)} classes")
        if count == 0:
            return
        if not -1 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(f"labels must lie in -1..{len(self.classes) - 1}")
        failed = self.failed
        if not np.isnan(self.probabilities[failed]).all():
            raise ValueError("a row with an error must have no probabilities (NaN)")
        good = self.probabilities[~failed]
        if not (np.isfinite(good).all() and (good >= 0).all()):
            raise ValueError("probabilities must be finite and not negative")
        sums = good.sum(axis=1, dtype=np.float64)
        if len(sums) and float(np.abs(sums - 1).max()) > SUM_TOLERANCE:
            raise ValueError("each row of probabilities must sum to 1")

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        return f"Predictions(N={len(self)} K={len(self.classes)}, {int(self.failed.sum())} failed)"

    @property
    def failed(self) -> Shaped[np.ndarray, " N"]:
        """(N,) bool: the source could not be read."""
        return np.asarray(self.errors != "", dtype=np.bool_)

    @property
    def predicted(self) -> Int64[np.ndarray, " N"]:
        """(N,) int64: the most probable class (of equals the first), -1 where the source failed."""
        best = np.argmax(self.probabilities, axis=1).astype(np.int64)
        return np.where(self.failed, np.int64(-1), best)

    @property
    def confidence(self) -> Shaped[np.ndarray, " N"]:
        """(N,) probability of the predicted class, NaN where the source failed."""
        return np.asarray(self.probabilities.max(axis=1))

    def write_csv(self, path: Path) -> None:
        """Write row, source, label, predicted, confidence, error, then p_<class>: all of it or nothing.

        Labels are class names, '' where unknown; probabilities have 6 significant digits, none where a source failed.
        Raises DataError where the file cannot be written.
        """
        names = ("", *self.classes)
        sources, errors = self.sources.tolist(), self.errors.tolist()
        rows, labels, predicted = self.rows.tolist(), self.labels.tolist(), self.predicted.tolist()
        blank = [""] * len(self.classes)
        with atomic_text(path) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*FIXED_COLUMNS, *(f"p_{name}" for name in self.classes)])
            for i, error in enumerate(errors):
                cells = blank if error else [f"{p:.6g}" for p in self.probabilities[i].tolist()]
                confidence = "" if error else cells[predicted[i]]
                first = (rows[i], sources[i], names[labels[i] + 1], names[predicted[i] + 1], confidence, error)
                writer.writerow([*first, *cells])


def read_csv(path: Path) -> Predictions:
    """Read back what `write_csv` wrote; probabilities as float64.

    Raises DataError, with the line where there is one, on a missing, foreign or damaged file.
    """
    rows: list[int] = []
    sources: list[str] = []
    labels: list[int] = []
    errors: list[str] = []
    probabilities: list[list[float]] = []
    line = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            classes = _classes_of(next(reader, []), path)
            number = {"": -1} | {name: k for k, name in enumerate(classes)}
            missing = [float("nan")] * len(classes)
            for cells in reader:
                line = reader.line_num
                row, source, label, _, _, error, *values = cells
                rows.append(int(row))
                sources.append(source)
                labels.append(number[label])
                errors.append(error)
                if len(values) != len(classes) or (error and any(values)):
                    raise ValueError("a wrong number of probabilities")
                probabilities.append(missing if error else [float(value) for value in values])
    except OSError as error:
        raise DataError(f"cannot read the predictions: {error.strerror}", where=path) from error
    except KeyError as error:
        raise DataError(f"the label {error} is none of the classes of the header", where=f"{path}:{line}") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"not a row of predictions: {error}", where=f"{path}:{line}") from error
    try:
        return Predictions(
            classes=classes,
            sources=np.array(sources, dtype=np.str_),
            labels=np.array(labels, dtype=np.int64),
            probabilities=np.array(probabilities, dtype=np.float64).reshape(len(rows), len(classes)),
            errors=np.array(errors, dtype=np.str_),
            rows=np.array(rows, dtype=np.int64),
        )
    except (ValueError, OverflowError) as error:
        raise DataError(f"damaged predictions: {error}", where=path) from error


def _classes_of(header: list[str], path: Path) -> tuple[str, ...]:
    fixed, named = tuple(header[: len(FIXED_COLUMNS)]), header[len(FIXED_COLUMNS) :]
    if fixed != FIXED_COLUMNS or not named or not all(name.startswith("p_") for name in named):
        raise DataError(
            "not a file of predictions",
            where=path,
            hint=f"Expected the columns {','.join(FIXED_COLUMNS)},p_<class>,... as `videogru eval` writes them.",
        )
    return tuple(name.removeprefix("p_") for name in named)
