"""tools/benchmarks/bench_export.py: its table, and the whole of it on a small model."""

import json
from pathlib import Path

import pytest

from tools.benchmarks import bench_export
from videogru.workflows.benchmark import Bench, Entry


def entry(name: str, bytes: int, ms: float, speedup: float) -> Entry:
    return Entry(name, name, bytes, 1.0, ms, 2 * ms, speedup, 10, 1e3 / ms, 100.0, None)


def test_ratios_are_of_eager_pytorch() -> None:
    entries = (entry("PyTorch, eager", 4_000_000, 320.0, 1.0), entry("onnx int8", 1_000_000, 40.0, 8.0))
    found = Bench(entries, None, threads=2, batch_size=4, rounds=3, frames="clips of 16 x 3 x 8 x 8")
    made = bench_export.table(found, 8, "causal", [0.0, 2e-3], {"tensorrt fp16": "no package"})
    eager, int8 = made["rows"]
    assert (eager["size_ratio"], int8["size_ratio"]) == (1.0, 0.25)
    assert int8["frame_p50_ms"] == pytest.approx(40 / 16)
    # 2.5 ms a frame with two threads: 400 frames a second, so 16 streams of 25 frames/s on two cores.
    assert int8["streams_a_core"] == pytest.approx(8)
    facts = dict.fromkeys(
        ("command", "date", "commit", "gpu", "cpu", "cores", "cores present", "threads", "load", "torch", "python"), "x"
    )
    text = bench_export.markdown({"machine": facts, "tables": [made]})
    assert "| onnx int8 | 1.00 | 0.250 | 2.50 | 5.00 | 8.00 | 8.0 | 100 | 2.0e-03 |" in text
    assert "| tensorrt fp16 | not run: no package |" in text


@pytest.mark.parametrize("words", [["--rounds", "1"], ["--threads", "0"], ["--sizes", "0"]])
def test_numbers_that_make_no_sense(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_export.main(["--out", str(tmp_path / "export"), *words])
    assert caught.value.code == 2
    assert "--rounds" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_model_in_all_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)  # see test_export
    monkeypatch.setattr(bench_export, "CALIBRATION", 2)
    words = ["--sizes", "32", "--encoder", "small", "--hidden-size", "8", "--rounds", "2", "--batch-size", "2"]
    try:
        assert bench_export.main(["--out", str(tmp_path / "deploy" / "export"), *words]) == 0
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    whole, stepwise = json.loads((tmp_path / "deploy" / "export.json").read_text())["tables"]
    assert len(whole["rows"]) == 1 + 8
    assert set(whole["not_run"]) == {"pt2 int8", "tensorrt fp32", "tensorrt fp16", "tensorrt int8"}
    assert len(stepwise["rows"]) == 1 + len(bench_export.STEP)
    by_name = {row["runs_on"]: row for row in whole["rows"]}
    assert by_name["onnx int8"]["bytes"] < by_name["onnx fp32"]["bytes"]
    assert by_name["onnx fp32"]["largest_difference"] < 1e-5
