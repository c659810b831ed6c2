import csv
import time
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from videogru.errors import DataError
from videogru.files import atomic_text
from videogru.inference.predictions import Predictions, read_csv


def make(count: int, num_classes: int, *, dtype: type = np.float64) -> Predictions:
    rng = np.random.default_rng(3)
    errors = np.array([""] * count, dtype="U80")
    probabilities = rng.dirichlet(np.full(num_classes, 0.3), size=count).astype(dtype)
    if count > 2:
        errors[2] = 'moov atom, "not" found\nat all'
        probabilities[2] = np.nan
    return Predictions(
        classes=tuple(f"class, {k}" for k in range(num_classes)),
        sources=np.array([f"dir/clip {i}, é.mp4" for i in range(count)]),
        labels=rng.integers(-1, num_classes, size=count),
        probabilities=probabilities,
        errors=errors,
        rows=np.arange(count, dtype=np.int64) * 2 + 1,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_round_trip_keeps_everything(tmp_path: Path, dtype: type) -> None:
    before = make(20, 7, dtype=dtype)
    path = tmp_path / "new" / "predictions.csv"
    before.write_csv(path)
    after = read_csv(path)
    assert after.classes == before.classes
    for column in ("sources", "labels", "errors", "rows", "predicted"):
        np.testing.assert_array_equal(getattr(after, column), getattr(before, column))
    np.testing.assert_allclose(after.probabilities, before.probabilities, rtol=6e-6)
    assert [p.name for p in path.parent.iterdir()] == ["predictions.csv"]


def test_the_file_reads_as_plain_csv(tmp_path: Path) -> None:
    predictions = make(5, 3)
    predictions.write_csv(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["row", "source", "label", "predicted", "confidence", "error"]
    assert list(rows[0])[6:] == ["p_class, 0", "p_class, 1", "p_class, 2"]
    assert (rows[2]["predicted"], rows[2]["confidence"], rows[2]["p_class, 0"]) == ("", "", "")
    assert rows[2]["error"] == 'moov atom, "not" found\nat all'
    for i in (0, 1, 3, 4):
        values = predictions.probabilities[i]
        assert rows[i]["predicted"] == predictions.classes[int(np.argmax(values))]
        assert float(rows[i]["confidence"]) == pytest.approx(max(values), rel=1e-5)


def test_no_rows_is_a_file_too(tmp_path: Path) -> None:
    make(0, 2).write_csv(tmp_path / "p.csv")
    assert len(read_csv(tmp_path / "p.csv")) == 0


def test_ten_thousand_by_a_hundred_is_quick(tmp_path: Path) -> None:
    predictions = make(10_000, 100)
    start = time.process_time()
    predictions.write_csv(tmp_path / "p.csv")
    assert time.process_time() - start < 2
    start = time.process_time()
    read_csv(tmp_path / "p.csv")
    assert time.process_time() - start < 2


HEADER = "row,source,label,predicted,confidence,error,p_a,p_b\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not a file of predictions"),
        ("source,label\na.mp4,b\n", "not a file of predictions"),
        ("row,source,label,predicted,confidence,error\n", "not a file of predictions"),
        (HEADER + "0,s,a,a,1\n", "p.csv:2: not a row"),
        (HEADER + "0,s,a,a,1,,1\n", "wrong number of probabilities"),
        (HEADER + "0,s,a,a,1,,1,zero\n", "p.csv:2: not a row"),
        (HEADER + "0,s,a,a,1,,1,0\n1,s,c,a,1,,1,0\n", "p.csv:3: the label 'c'"),
        (HEADER + "0,s,a,a,1,,0.5,0.1\n", "sum to 1"),
        (HEADER + "0,s,a,a,1,,inf,0\n", "finite"),
        (HEADER + "0,s,a,a,1,broken,1,0\n", "wrong number of probabilities"),
        (HEADER.replace("p_b", "p_a"), "different"),
        (HEADER + f"{2**70},s,a,a,1,,1,0\n", "damaged"),
        (HEADER + '0,"s,a,a,1,,1,0\n', "not a row"),
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        read_csv(path)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_csv(tmp_path / "absent.csv")
    (tmp_path / "video.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"video\.csv"):
        read_csv(tmp_path / "video.csv")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": np.array([0, 2])}, "labels must lie"),
        ({"labels": np.array([0])}, "length"),
        ({"classes": ("a", "a")}, "different"),
        ({"classes": ("a", "")}, "non-empty"),
        ({"classes": ("a", "b", "c")}, "3 classes"),
        ({"errors": np.array(["", "gone"])}, "no probabilities"),
        ({"probabilities": np.array([[0.5, 0.5], [np.nan, np.nan]])}, "finite"),
        ({"probabilities": np.array([[0.5, 0.5], [1.5, -0.5]])}, "negative"),
    ],
)
def test_the_record_checks_itself(change: dict[str, object], expected: str) -> None:
    columns: dict[str, object] = {
        "classes": ("a", "b"),
        "sources": np.array(["x", "y"]),
        "labels": np.array([0, -1]),
        "probabilities": np.array([[0.5, 0.5], [0.1, 0.9]]),
        "errors": np.array(["", ""]),
        "rows": np.array([0, 1]),
    }
    assert len(Predictions(**columns)) == 2  # type: ignore[arg-type]
    # A shape that differs from its neighbors is also caught by the shape annotations.
    with pytest.raises(Exception, match=rf"(?i){expected}|type-check"):
        Predictions(**(columns | change))  # type: ignore[arg-type]


def test_a_broken_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("old")

    def half(file: TextIO) -> None:
        file.write("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), atomic_text(path) as file:
        half(file)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=r"p\.csv"), atomic_text(path / "below"):
        pass
