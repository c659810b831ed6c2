"""tools/benchmarks/bench_explain.py: what it plants, and scores counted by hand."""

from pathlib import Path

import numpy as np
import pytest

from tools.benchmarks.bench_explain import (
    ATTENTION,
    RANDOM,
    Scores,
    main,
    marked_corpus,
    plant,
    score,
    shown,
    spread,
    summary,
)
from videogru.config import DataConfig
from videogru.data.manifests.corpus import open_corpus


def test_half_of_each_split_is_marked_where_it_is_told() -> None:
    corpus = open_corpus(DataConfig(dataset="adrenalmnist3d"))
    made, marks = marked_corpus(corpus, seed=3, volumes=20)
    assert made.arrays is not None and made.arrays.shape == (60, 28, 1, 28, 28)
    for split in ("train", "val", "test"):
        assert made.manifest.labels[made.manifest.rows(split)].sum() == 10
    np.testing.assert_array_equal(marks.count > 0, made.manifest.labels == 1)
    assert set(marks.count[marks.count > 0]) == {1, 2, 3}
    again, _ = marked_corpus(corpus, seed=3, volumes=20)
    np.testing.assert_array_equal(made.arrays, again.arrays)


def test_a_mark_is_in_its_slices_and_nowhere_else() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        volume = np.zeros((28, 28, 28), np.float32)
        first, count, (y, x) = plant(volume, generator)
        marked = np.flatnonzero(volume.max(axis=(1, 2)))
        assert marked.tolist() == list(range(first, first + count))
        peak = np.unravel_index(volume[first].argmax(), (28, 28))
        assert abs(peak[0] - y) <= 0.5 and abs(peak[1] - x) <= 0.5
        assert 80 < volume[first].max() < 300


class FromStep:
    """Sure of "marked" as long as steps 2 and 3 are both there, undecided without one of them, else of "plain"."""

    def logits(self, kept: list[list[int]]) -> np.ndarray:
        return np.array([[-40.0, 0.0, 40.0][len({2, 3} & set(steps))] * np.array([-0.5, 0.5]) for steps in kept])


@pytest.mark.parametrize(
    ("order", "hit", "rank", "curve"),
    [
        ([2, 3, 0, 1], 1, 1, [1, 0.5, 0, 0]),
        ([0, 1, 3, 2], 0, 3, [1, 1, 1, 0.5]),
    ],
)
def test_scores_by_hand(order: list[int], hit: int, rank: int, curve: list[float]) -> None:
    found = score(FromStep(), np.array(order), range(2, 4))  # type: ignore[arg-type]
    assert found[:2] == (hit, rank)
    np.testing.assert_allclose(found[2], curve, atol=1e-6)


def test_areas_are_compared_volume_by_volume() -> None:
    curves = np.array([[1.0, 0.0], [0.5, 0.1], [1.0, 0.4]])
    table = {
        name: Scores(np.array([1.0, 0.0, 1.0]), np.array([1.0, 4.0, 1.0]), curves + shift)
        for name, shift in (("mine", 0.0), (ATTENTION, 0.25), (RANDOM, 0.5))
    }
    rows = summary(table)
    assert rows["mine"]["volumes"] == 3
    assert rows["mine"]["hit"][0] == pytest.approx(2 / 3)
    assert rows["mine"]["rank"][0] == pytest.approx(2)
    assert rows["mine"]["area"][0] == pytest.approx(0.5)
    assert rows["mine"]["area minus random's"] == pytest.approx([-0.5] * 3)
    assert rows["mine"]["area minus attention's"] == pytest.approx([-0.25] * 3)
    assert spread(np.array([])) is None
    assert shown([-0.5, -0.6, -0.4]) == "-0.500 (-0.600 to -0.400)"
    assert shown([0.5, 0.4, 0.6]) == "0.500 (0.400–0.600)"


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--out", str(tmp_path / "x"), "--epochs", "0"])
    assert caught.value.code == 2
    assert "--epochs wants 1 or more" in capsys.readouterr().err
