"""The comparison of video nets, from training to table, on a few small clips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.command_line import QUICK, videogru, write_video
from tools.experiments import train_r3d
from videogru.inference.predictions import read_csv

ALONE = {"PYTHONPATH": str(Path(__file__).resolve().parents[3]), "OMP_NUM_THREADS": "1"}


def tool(name: str, *words: str) -> int:
    """In a process of its own: there no annotation forbids another net in the Classifier's place."""
    command = [sys.executable, "-m", f"tools.experiments.{name}", *words]
    return subprocess.run(command, env=os.environ | ALONE, check=False).returncode


def test_clips_are_stretched_to_equal_lengths_by_the_nearest_in_time() -> None:
    seen: list[torch.Tensor] = []
    net = train_r3d.R3D(2, (0.0,), (1.0,), steps=4)
    net.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frames = torch.arange(2 * 6, dtype=torch.float32).view(2, 6, 1, 1, 1).expand(-1, -1, 1, 16, 16) / 100
    with torch.inference_mode():
        logits = net.eval()(frames, torch.tensor([6, 2]))
        # What a training reads, and the table does not.
        assert torch.equal(net.logits_of(*net.features(frames, torch.tensor([6, 2]))), logits)
    assert logits.shape == (2, 2)
    steps = (seen[0][:, :, :, 0, 0] * 100).round().int()  # (B C T)
    assert steps.shape == (2, 3, 4)
    # centers of four parts of 6 frames: 0.75, 2.25, 3.75, 5.25; of 2 frames: 0.25, 0.75, 1.25, 1.75
    assert steps[0, 0].tolist() == [0, 2, 3, 5]
    assert steps[1, 2].tolist() == [6, 6, 7, 7]


@pytest.mark.slow
def test_the_table_of_two_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, bright in (("left", False), ("right", True)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for number in range(8):
            write_video(tmp_path / "clips" / name / f"{number}.avi", bright=bright, seed=number)
    settings = ["--set", "data.frame_size=32", "--set", "data.num_frames=8", "--batch-size", "4"]
    assert videogru("train", "--dataset", "clips", *QUICK, *settings, "--out", "gru").code == 0
    assert tool("train_r3d", "gru", "--out", "r3d", "--epochs", "2", "--minutes", "0") == 130
    assert not Path("r3d/predictions-test.csv").exists()
    assert tool("train_r3d", "gru", "--out", "r3d", "--epochs", "2") == 0
    assert len(Path("r3d/metrics.csv").read_text().splitlines()) == 3
    ours, theirs = read_csv(Path("gru/predictions-test.csv")), read_csv(Path("r3d/predictions-test.csv"))
    assert np.array_equal(ours.rows, theirs.rows)
    assert tool("video_table", "gru=gru", "r3d=r3d", "--out", "table", "--rounds", "1", "--frames", "8") == 0
    table = json.loads(Path("table.json").read_text())
    first, second = table["nets"]
    assert table["train_rows"] == 12
    assert first["accuracy"][0] == pytest.approx((ours.predicted == ours.labels).mean())
    gap = (ours.predicted == ours.labels).mean() - (theirs.predicted == theirs.labels).mean()
    assert second["first_minus_this"][0] == pytest.approx(gap)
    assert second["parameters"] > 33e6 > 1e6 > first["parameters"]
    assert second["macs"] > 100 * first["macs"]
    assert len(second["infer_ms"]) == 1
    assert tool("video_table", "gru=gru", "r3d=absent", "--out", "table") == 2
