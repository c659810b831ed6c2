"""The benchmark of encode once: what it reports of a small folder; no time is judged."""

import json
from pathlib import Path

import pytest

from tests.workflows.test_extract_features import model_file, sources
from tools.benchmarks import bench_features


def test_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_features, "default_workers", lambda *_: 0)
    sources(tmp_path / "data", "image", each=8)
    model = model_file(tmp_path / "model.safetensors", model__seq="rows")
    words = [str(model), "data", "--work", "work", "--rounds", "2", "--batch", "4", "--out", "out"]
    assert bench_features.main(words) == 0
    found = json.loads((tmp_path / "out" / "features-data.json").read_text())
    assert found["form"] == "maps" and found["largest_difference"] < 1e-5 and found["compared_rows"] > 0
    epochs = found["epoch_seconds"]
    assert [len(seconds) for seconds in epochs.values()] == [2, 2]
    for ratio, ours, files in zip(found["ratios"], *epochs.values(), strict=True):
        assert ratio == pytest.approx(files / ours)
    assert "seconds an epoch" in (tmp_path / "out" / "features-data.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "features-data.json").read_text()


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_features.main(["model", "data", "--rounds", "0"])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
