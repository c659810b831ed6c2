"""The table of what int8 costs: on a small run, and verdicts by hand."""

import json
from pathlib import Path

import jaxtyping
import pytest

from tests.support.command_line import QUICK, videogru
from tools.experiments import int8_accuracy


def test_verdicts() -> None:
    row = {"classes": 10, "accuracy": 0.894, "accuracy_of_pytorch": 0.9, "auroc": 0.7, "auroc_of_pytorch": 0.9}
    assert int8_accuracy.verdict(row) == "NOT met"
    assert int8_accuracy.verdict({**row, "accuracy": 0.896}) == "met"
    assert int8_accuracy.verdict({**row, "classes": 2, "accuracy": 0.9}) == "NOT met"
    assert int8_accuracy.verdict({**row, "classes": 2, "auroc": 0.896}) == "met"


@pytest.mark.slow
def test_a_run_of_real_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    small = ("--set", "data.num_frames=8", "--set", "model.encoder_width=8", "--set", "model.hidden_size=8")
    assert videogru("train", "--dataset", "adrenalmnist3d", *QUICK, *small, "--out", "run").code == 0
    jaxtyping.config.update("jaxtyping_disable", True)  # the check of shapes would freeze sizes while a graph is traced
    try:
        assert int8_accuracy.main(["run", "--formats", "onnx", "--out", "out"]) == 0
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    val, test = json.loads(Path("out/int8.json").read_text())["rows"]
    assert (val["samples"], test["samples"]) == (98, 298) and val["data"] == "adrenalmnist3d"
    said = json.loads(Path("run/evaluation-test.json").read_text())
    assert test["accuracy_of_pytorch"] == pytest.approx(said["metrics"]["top1"]["value"], abs=1e-9)
    assert abs(test["accuracy"] - test["accuracy_of_pytorch"]) <= test["flips"] / 298
    assert "| adrenalmnist3d | small, gru | onnx |" in Path("out/int8.md").read_text()


def test_what_is_no_format_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        int8_accuracy.main(["run", "--formats", "oonx"])
    assert caught.value.code == 2 and "--formats wants names of" in capsys.readouterr().err
