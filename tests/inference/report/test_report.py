import base64
import hashlib
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from videogru.errors import DataError, SourceError
from videogru.inference.evaluation import evaluate
from videogru.inference.predictions import Predictions
from videogru.inference.report.figures import FIRST, confusion_picture, curve_series, strip_pictures
from videogru.inference.report.report import confused_pairs, extreme_rows, read_curves, write_report

EVIL = """</title><script>alert("1")</script><img src=x onerror='alert(2)'>"""
CURVES = [
    {"epoch": 0.0, "step": 9.0, "val_loss": 1.0, "val_accuracy": 0.4, "val_auroc": 0.5},
    {"epoch": 0.0, "step": 9.0, "train_loss": 1.2, "train_accuracy": 0.3},
    {"epoch": 1.0, "step": 19.0, "train_loss": 0.9, "val_loss": 0.8, "val_accuracy": 0.6},
]


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def make(count: int, num_classes: int, *, failed: int = 0, evil: str = "") -> Predictions:
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(num_classes, size=count)
    logits = rng.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += 2
    odds = np.exp(logits)
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    errors = np.array([""] * count, dtype="U120")
    errors[:failed] = f"cannot be decoded {evil}"
    probabilities[:failed] = np.nan
    return Predictions(
        classes=tuple(f"class-{k}{evil}" for k in range(num_classes)),
        sources=np.array([f"clip-{i:04d}{evil}" for i in range(count)]),
        labels=labels,
        probabilities=probabilities,
        errors=errors,
        rows=np.arange(count),
    )


def show(i: int) -> np.ndarray:
    return np.full((10, 12, 16, 3), i % 255, dtype=np.uint8)


def write(
    run: Path, predictions: Predictions, *, strips: Callable[[int], np.ndarray | None] = show, evil: str = ""
) -> tuple[str, Page]:
    path = write_report(
        run,
        title=f"Run {evil}",
        evaluation=evaluate(predictions, resamples=20),
        predictions=predictions,
        curves=CURVES,
        config_yaml=f"data:\n  dataset: {evil}\n",
        strips=strips,
        facts={"Encoder": f"small {evil}", "Parameters": "1,234"},
        commands=[f"videogru eval {evil}"],
        step_name="slices",
    )
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.mark.parametrize("num_classes", [2, pytest.param(10, marks=pytest.mark.slow), 30])
def test_the_page_stands_alone(tmp_path: Path, num_classes: int) -> None:
    html, page = write(tmp_path, make(120, num_classes, failed=3))
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "base"}
        if "src" in attributes:
            assert (attributes["src"] or "").startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.findall(r"https?:|@import|file:|//cdn", html)
    assert not re.findall(r"url\((?!#)", html)


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    plain, evil = make(40, 3, failed=2), make(40, 3, failed=2, evil=EVIL)
    _, expected = write(tmp_path / "plain", plain)
    _, page = write(tmp_path / "evil", evil, evil=EVIL)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    assert page.count("script") == 1
    assert page.text.count(EVIL) > 20
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_only_the_own_script_may_run(tmp_path: Path) -> None:
    html, page = write(tmp_path, make(40, 3))
    script = re.search(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert policy.endswith(f"script-src 'sha256-{digest}'")


def test_figures_are_those_of_the_evaluation(tmp_path: Path) -> None:
    predictions = make(90, 4, failed=2)
    found = evaluate(predictions, resamples=20)
    _, page = write(tmp_path, predictions)
    text = " ".join(page.text.split())
    top1 = found.metrics["top1"]
    assert f"Accuracy {top1.value:.3f} {top1.low:.3f} to {top1.high:.3f}" in text
    assert "88 samples evaluated, 4 classes · 2 could not be read" in text
    row = found.per_class[1]
    assert f"class-1{row.support}{row.predicted}{row.precision:.3f}{row.recall:.3f}{row.f1:.3f}{row.auroc:.3f}" in text
    assert "clip-0000cannot be decoded" in text
    assert "videogru eval" in text
    assert "Parameters1,234" in text


def test_strips_are_asked_for_the_shown_rows_only(tmp_path: Path) -> None:
    predictions = make(200, 3, failed=2)
    asked: list[int] = []
    _, page = write(tmp_path, predictions, strips=lambda i: (asked.append(i), show(i))[1])
    right, wrong = extreme_rows(predictions)
    assert asked == [*right.tolist(), *wrong.tolist()]
    assert len(asked) == 12
    assert page.count("img") == 12 * 8


def test_extremes_are_the_surest(tmp_path: Path) -> None:
    predictions = make(100, 3, failed=5)
    right, wrong = extreme_rows(predictions)
    by_hand: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for i in range(5, 100):
        row = predictions.probabilities[i].tolist()
        by_hand[row.index(max(row)) == predictions.labels[i]].append((-max(row), i))
    assert right.tolist() == [i for _, i in sorted(by_hand[True])[:6]]
    assert wrong.tolist() == [i for _, i in sorted(by_hand[False])[:6]]


def test_a_strip_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    def broken(i: int) -> np.ndarray | None:
        if i % 2:
            raise SourceError("went away", where=f"clip {i}")
        return None

    _, page = write(tmp_path, make(40, 3), strips=broken)
    assert "went away" in page.text
    assert "no picture" in page.text
    assert page.count("img") == 0


def test_a_perfect_model_without_a_log_has_a_page_too(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2] * 4)
    predictions = Predictions(
        classes=("$x^", "日本", "c" * 60),
        sources=np.array(["s"] * 12),
        labels=labels,
        probabilities=np.eye(3, dtype=np.float32)[labels],
        errors=np.array([""] * 12),
        rows=np.arange(12),
    )
    path = write_report(
        tmp_path,
        title="Perfect",
        evaluation=evaluate(predictions, resamples=5),
        predictions=predictions,
        curves=[],
        config_yaml="",
        strips=show,
        facts={},
        commands=[],
    )
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Training" not in text
    assert "日本" in text
    assert "None." in text


def test_confused_pairs_are_counted() -> None:
    predictions = make(300, 15)
    found = evaluate(predictions, resamples=2)
    truth, predicted, count, share = confused_pairs(found)[0]
    wrong = [
        (found.classes[t], found.classes[p])
        for t, p in zip(predictions.labels, predictions.predicted, strict=True)
        if t != p
    ]
    assert count == wrong.count((truth, predicted)) == max(wrong.count(pair) for pair in wrong)
    assert share == pytest.approx(count / int((predictions.labels == found.classes.index(truth)).sum()))


def picture(uri: str) -> Image.Image:
    kind, content = uri.split(",", 1)
    opened = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:image/{(opened.format or '').lower()};base64"
    return opened


def test_strips_spread_over_the_clip_and_scans_stay_exact() -> None:
    rng = np.random.default_rng(0)
    scan = np.repeat(rng.integers(0, 255, size=(29, 20, 30, 1), dtype=np.uint8), 3, axis=-1)
    pictures = [np.asarray(picture(uri)) for uri in strip_pictures(scan)]
    assert len(pictures) == 8
    for shown, index in zip(pictures, [0, 4, 8, 12, 16, 20, 24, 28], strict=True):
        np.testing.assert_array_equal(shown, scan[index, ..., 0])
    video = rng.integers(0, 255, size=(3, 240, 320, 3), dtype=np.uint8)
    assert [picture(uri).size for uri in strip_pictures(video)] == [(160, 120)] * 3


def test_the_big_matrix_shows_the_shares() -> None:
    confusion = np.zeros((20, 20), dtype=np.int64)
    confusion[3, 3], confusion[3, 7] = 3, 1
    pixels = np.asarray(picture(confusion_picture(confusion)))
    cell = len(pixels) // 20
    opacity = pixels[::cell, ::cell, 3]
    assert opacity[3, 3] == round(255 * 0.75**0.5)
    assert opacity[3, 7] == round(255 * 0.5)
    assert np.count_nonzero(opacity) == 2


def test_read_curves_takes_blank_and_absent_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,lr,step,train_loss,val_loss\n0,,9,,1.5\n0,0.001,9,2.5,\n,,,,\n1,,19,nan,\n")
    rows = read_curves(path)
    assert rows[:2] == [
        {"epoch": 0.0, "step": 9.0, "val_loss": 1.5},
        {"epoch": 0.0, "lr": 0.001, "step": 9.0, "train_loss": 2.5},
    ]
    assert np.isnan(rows[2]["train_loss"])
    assert len(rows) == 3


@pytest.mark.parametrize("content", ["epoch,loss\n0,high\n", "epoch,loss\n0,1,2,3\n"])
def test_a_foreign_log_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=r"metrics\.csv:2"):
        read_curves(path)
    with pytest.raises(DataError, match="No such file"):
        read_curves(tmp_path / "absent.csv")


def test_several_values_of_an_epoch_are_averaged() -> None:
    rows = [{"epoch": 0.0, "train_loss": 3.0}, {"epoch": 0.0, "train_loss": 1.0}, {"epoch": 2.0, "train_loss": 1.0}]
    assert curve_series(rows, {"train_loss": ("train", FIRST), "val_loss": ("val", FIRST)}) == [
        ("train", FIRST, [1, 3], [2.0, 1.0])
    ]
