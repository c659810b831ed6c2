"""tools/benchmarks/bench_timeline.py against timelines counted by hand and scikit-learn's idea of F1."""

from pathlib import Path

import pytest
from sklearn.metrics import f1_score

from tools.benchmarks.bench_timeline import Counts, compare, main, overlap, read_truths, scores
from videogru.errors import DataError
from videogru.inference.timeline.timeline import Segment


def line(*parts: tuple[float, float, str]) -> list[Segment]:
    return [Segment(start, end, label, 0.9) for start, end, label in parts]


TRUTH = line((0.0, 1.0, "bin"), (1.0, 2.0, "blue"), (2.0, 2.5, "at"), (2.5, 3.0, "f"))


def test_the_truth_itself_has_no_error() -> None:
    assert compare(TRUTH, TRUTH) == Counts(rows=4, segments=4, found=4, pairs=(4, 4, 4), edits=0)


def test_nothing_said_misses_all() -> None:
    assert compare([], TRUTH) == Counts(4, 0, 0, (0, 0, 0), 4)


def test_counted_by_hand() -> None:
    #                 a third of bin's time   its middle missed        as long again            wrong
    said = line((0.0, 0.4, "bin"), (1.6, 2.0, "blue"), (2.0, 3.0, "at"), (3.0, 3.2, "lay"))
    # bin 0.4, blue 0.4, at 0.5; found: only at's middle; f missing and lay wrong: one change.
    assert compare(said, TRUTH) == Counts(4, 4, 1, (3, 3, 1), 1)


def test_one_row_is_not_paired_twice() -> None:
    said = line((0.0, 0.5, "bin"), (0.5, 1.0, "bin"))
    assert compare(said, TRUTH).pairs == (1, 1, 1)
    assert compare(said, TRUTH).edits == 3 + 1 - 1  # the second bin, and three that are missing, one of them a change


def test_order_counts_as_edits() -> None:
    said = line((0.0, 1.0, "blue"), (1.0, 2.0, "bin"))
    assert compare(said, TRUTH[:2]).edits == 2


def test_overlap_of_other_classes_is_none() -> None:
    first, second = line((0.0, 1.0, "bin"), (0.0, 1.0, "blue"))
    assert overlap(first, second) == 0
    assert overlap(first, first) == 1
    assert overlap(*line((0.0, 1.0, "bin"), (2.0, 3.0, "bin"))) == 0


def test_scores_weigh_rows_and_hold_their_value() -> None:
    counts = [Counts(6, 5, 4, (5, 4, 3), 2), Counts(2, 2, 0, (0, 0, 0), 2), Counts(6, 6, 6, (6, 6, 6), 0)] * 5
    result = scores(counts)
    assert result["found"][0] == pytest.approx(10 / 14)
    assert result["error rate"][0] == pytest.approx(4 / 14)
    # Eleven of 13 segments pair with 14 rows: 11 right, 2 too many, 3 missing.
    meant, said = [1] * 14 + [0] * 2, [1] * 11 + [0] * 3 + [1] * 2
    assert result["F1 at 0.1"][0] == pytest.approx(f1_score(meant, said))
    assert all(low < value < high for value, low, high in result.values())


def test_a_table_without_times_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    table = tmp_path / "table.csv"
    table.write_text("source,label,split\na.mp4,bin,test\nb.mp4,blue,train\n")
    with pytest.raises(DataError, match="start_seconds"):
        read_truths(str(table), "test")
    with pytest.raises(DataError, match="no rows of split val"):
        read_truths(str(table), "val")
    assert main([str(tmp_path), "--table", str(table), "--out", str(tmp_path / "out")]) == 2
    assert "bench_timeline.py: " in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
