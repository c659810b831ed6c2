"""The benchmark of streams that stop early: intervals, shares, curves by hand, and its three files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.command_line import write_video
from tests.support.stream_sources import with_exits, write_stream_model
from tools.benchmarks import bench_exit
from tools.benchmarks.bench_exit import Pass, clopper_pearson, curve, judge


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 200), (1, 200), (5, 200), (100, 200), (200, 200)])
def test_exact_intervals_leave_one_fortieth_in_each_tail(count: int, of: int) -> None:
    def chance(share: float, counts: range) -> float:
        return math.fsum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in counts)

    found = clopper_pearson(count, of)
    assert found.value == count / of
    assert (found.low == 0) == (count == 0) and (found.high == 1) == (count == of)
    if count > 0:
        assert chance(found.low, range(count, of + 1)) == pytest.approx(0.025, abs=1e-9)
    if count < of:
        assert chance(found.high, range(count + 1)) == pytest.approx(0.025, abs=1e-9)


def test_shares_by_hand() -> None:
    full = [Pass(10, 1.0, 0, 0.2), Pass(30, 3.0, 1, 0.6)]
    early = [Pass(10, 1.0, 0, 0.3), Pass(10, 0.9, 0, 0.1)]
    found = judge(0.1, 0.8, early, full, [0, 1])
    assert (found.disagreeing, found.accuracy, found.median_stop_seconds) == (1, 0.5, 0.95)
    values = [found.frames_saved.value, found.video_seconds_saved.value, found.seconds_saved.value]
    np.testing.assert_allclose(values, [1 - 20 / 40, 1 - 1.9 / 4, 1 - 0.4 / 0.8])
    # Of two videos a resample has the first twice, both, or the second twice.
    np.testing.assert_allclose([found.frames_saved.low, found.frames_saved.high], [0.0, 1 - 10 / 30])
    assert np.isnan(judge(0.1, 0.8, early, full, [-1, -1]).accuracy)


def test_the_curve_by_hand() -> None:
    a = np.array([[0.4, 0.6], [0.3, 0.7], [0.9, 0.1]])  # 1, 1, 0
    b = np.array([[0.2, 0.8], [0.05, 0.95]])  # 1, 1
    found = {level: (changed, saved) for level, changed, saved in curve([a, b])}
    assert found[0.0] == (0.5, 1 - 2 / 5)
    assert found[0.6] == (0.5, 1 - 3 / 5)
    assert found[0.7] == (0.0, 1 - 4 / 5)
    assert found[0.95] == (0.0, 0.0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("videos")
    lines = ["source,label,split"]
    for number in range(4):
        write_video(place / f"{number}.mp4", bright=number % 2 == 0, seed=number, frames=8 + number)
        lines.append(f"{number}.mp4,{('one', 'two')[number % 2]},test")
    (place / "table.csv").write_text("\n".join(lines) + "\n")
    return place


def test_writes_its_three_files(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = with_exits(tmp_path, [0.0, 1.0], [9, 0]), tmp_path / "out"
    words = [str(path), "--dataset", str(videos / "table.csv"), "--risks", "0.5,0.05,0.001", "--out", str(out)]
    assert bench_exit.main(words) == 0
    figures = json.loads((out / "exit.json").read_text())
    assert figures["videos"] == 4 and figures["to the end"]["frames"] == 9.5
    never, first = figures["risks"]
    # Never sure enough: all is read, so nothing differs. Always sure enough: one frame of 8, 9, 10 and 11.
    assert (never["surer_than"], never["disagreeing"], never["frames_saved"]["value"]) == (1.0, 0, 0.0)
    assert first["frames_saved"]["value"] == pytest.approx(1 - 4 / 38)
    assert first["video_seconds_saved"]["value"] == 1.0 and first["median_stop_seconds"] == 0.0
    assert first["disagreement"]["value"] == first["disagreeing"] / 4
    text = (out / "exit.md").read_text()
    assert "| 0.001 | refused: the model was calibrated on 99 videos, which promise no risk below 0.01 |" in text
    assert text in capsys.readouterr().out
    assert (out / "exit.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_told(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_stream_model(tmp_path / "model.safetensors")
    table = str(videos / "table.csv")
    assert bench_exit.main([str(model), "--dataset", table, "--out", str(tmp_path)]) == 2
    assert "it was not calibrated" in capsys.readouterr().err
    for words in (["--risks", "0.1,x"], ["--risks", "0"], ["--risks", "nan"], ["--videos", "-1"]):
        with pytest.raises(SystemExit) as caught:
            bench_exit.main([str(model), *words])
        assert caught.value.code == 2 and capsys.readouterr().err.startswith("bench_exit.py: --risks wants")
    lines = (videos / "table.csv").read_text() + "gone.mp4,one,test\n"
    (videos / "gone.csv").write_text(lines)
    model = with_exits(tmp_path, [0.0], [0])
    words = [str(model), "--dataset", str(videos / "gone.csv"), "--risks", "0.1", "--out", str(tmp_path)]
    assert bench_exit.main(words) == 3
    assert "not read: gone.mp4" in capsys.readouterr().out
