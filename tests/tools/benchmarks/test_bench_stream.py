"""The benchmark of streams: contenders that say the same, blocks, tables, and what outlives an interrupt."""

import json
from pathlib import Path

import jaxtyping
import pytest
import torch

from tests.support.stream_sources import write_stream_model
from tools.benchmarks import bench_stream, stream_contenders
from tools.benchmarks.bench_stream import Block, Results

SMALL = ["--encoder=pixels", "--frame-size=8", "--hidden-size=4", "--num-layers=1", "--window=3"]
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told on Linux only")


def test_contenders_say_the_same_until_the_window_is_full() -> None:
    classifier = stream_contenders.build("conv2", 6, 2, 8)
    readers, frames = stream_contenders.readers(classifier, 4), stream_contenders.frames_of(classifier)
    assert tuple(readers) == ("step", "window", "kept maps") and len({frame.sum().item() for frame in frames}) > 60
    with torch.inference_mode():
        for place in range(6):
            step, window, kept = (read(frames[place]) for read in readers.values())
            torch.testing.assert_close(kept, window, rtol=0, atol=1e-5)
            assert torch.allclose(step, window, rtol=0, atol=1e-5) == (place < 4)
        last = classifier(frames[2:6, 0].unsqueeze(0), torch.tensor([4]))
    torch.testing.assert_close(window, last, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_exports_say_what_pytorch_says(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    jaxtyping.config.update("jaxtyping_disable", True)  # the check of shapes would freeze sizes while a graph is traced
    try:
        classifier = stream_contenders.build("conv2", 6, 2, 8)
        exports = stream_contenders.export_readers(classifier, None, 4, "onnx", "fp32", tmp_path, 1)
        with torch.inference_mode():
            eager = stream_contenders.readers(classifier, 4)
            for frame in stream_contenders.frames_of(classifier)[:6]:
                for name in ("step", "window"):
                    said = exports[f"onnx fp32 {name}"](frame)
                    torch.testing.assert_close(said, eager[name](frame).softmax(1), rtol=0, atol=1e-5)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_tables() -> None:
    rounds = {"step": [2.0, 1.0, 4.0], "window": [30.0, 16.0, 62.0], "kept maps": [3.0, 2.0, 8.0]}
    rounds |= {"onnx int8 step": [1.0, 0.5, 2.0], "onnx int8 window": [9.0, 5.0, 22.0], "r3d_18": [80.0, 41.0, 100.0]}
    blocks = [Block(10 * k, 5.0 + k, 9.0, 100.0 + k) for k in range(1, 22)]
    results = Results(rounds, blocks)
    assert results.ratios("window") == [15, 16, 15.5]
    settings = {"model": "Encoder x.", "repeats": 5, "window": 16, "frames": 300, "block": 10, "long": "step"}
    lines = bench_stream.report(results, {"cpu": "abacus", "command": "python x"}, settings).splitlines()
    assert "| PyTorch, `step`, with the state | 2.00 (1.00–4.00) | 1.0 (1.0–1.0) |" in lines
    assert "| PyTorch, the last 16 frames again | 30.00 (16.00–62.00) | 15.5 (15.0–16.0) |" in lines
    assert "| onnx int8, the last 16 frames again | 9.00 (5.00–22.00) | 10.0 (9.0–11.0) |" in lines
    assert "| PyTorch, r3d_18 on the last 16 frames | 80.00 (41.00–100.00) | 40.0 (25.0–41.0) |" in lines
    assert "- PyTorch: a step 12 times cheaper is met." in lines
    assert "- onnx int8: a step 12 times cheaper is NOT met." in lines
    assert (
        "One stream of 210 frames (of 300) by step, in blocks of 10; the first block, which warms up, is left out."
        in lines
    )
    # Tenths of 20 blocks: 2 and 3, 20 and 21.
    assert (
        "| ms per frame, median of blocks | 7.50 | 25.50 |" in lines
        and "| resident set, MiB | 102.5 | 120.5 |" in lines
    )
    assert "- cpu: abacus" in lines and "Encoder x." in lines


@LINUX
def test_writes_its_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_stream_model(tmp_path / "model.safetensors", cell="lstm", use_gaps=True)
    sizes = ["--window=3", "--rounds=2", "--repeats=3", "--frames=25", "--block=10"]
    assert bench_stream.main(["--model", str(model), *sizes, "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out/stream.json").read_text())
    assert [block["frames"] for block in figures["blocks"]] == [10, 20]
    assert all(0 < block["median_ms"] <= block["p95_ms"] and block["rss_mib"] > 50 for block in figures["blocks"])
    assert {name: len(taken) for name, taken in figures["rounds"].items()} == dict.fromkeys(
        ("step", "window", "kept maps", "r3d_18"), 2
    )
    assert "1 x lstm 6" in figures["settings"]["model"] and "16 x 16 pixels" in figures["settings"]["model"]
    assert (tmp_path / "out/stream.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "out/stream.png").read_bytes().startswith(b"\x89PNG")


@LINUX
def test_an_interrupt_leaves_the_blocks_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def memory() -> float:
        asked.append(1)
        if len(asked) == 14:
            raise KeyboardInterrupt
        return 70.0

    monkeypatch.setattr(bench_stream, "rss_mib", memory)
    sizes = ["--rounds=1", "--repeats=1", "--frames=40", "--block=2"]
    assert bench_stream.main([*SMALL, *sizes, "--out", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "stream.json").read_text())["blocks"]) == 13
    assert "One stream of 26 frames (of 40) by step" in (tmp_path / "stream.md").read_text()
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds=0"],
        ["--frames=5", "--block=6"],
        ["--threads=-1"],
        ["--windows=3"],
        ["--exports=onnx"],
        ["--long=x"],
        ["--exports", "onnx:fp32", "--device=cuda"],
    ],
)
def test_sizes_that_cannot_be(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_stream.main(words)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("bench_stream.py: ")


def test_a_model_that_cannot_stream_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_stream_model(tmp_path / "model.safetensors", temporal="bi")
    assert bench_stream.main(["--model", str(model), "--out", str(tmp_path)]) == 2
    assert "model.temporal=causal" in capsys.readouterr().err
