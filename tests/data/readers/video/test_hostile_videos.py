"""Videos whose decoder hangs or crashes, through the commands: each costs its row, not the run."""

import csv
import ctypes
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.command_line import QUICK, videogru, write_video
from videogru.data.readers.video.pyav_reader import PyavVideo

WAYS = {
    "hang": lambda: ctypes.PyDLL(None).sleep(1000),  # holds the interpreter lock
    "segfault": lambda: ctypes.string_at(0),
    "leave": lambda: os._exit(7),
}
REASONS = {"hang": "longer than 1 s", "segfault": "signal 11", "leave": "exit code 7"}
WATCHED = ("--set", "data.decode_timeout_seconds=1", "--set", "data.frame_size=32", "--set", "data.num_frames=4")


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files named after a way to misbehave do so in the decoder; workers inherit it, being forked."""
    read = PyavVideo._read

    def misbehaving(self: PyavVideo, chosen: list[int]) -> list[np.ndarray]:
        WAYS.get(self.path.stem, lambda: None)()
        return read(self, chosen)

    monkeypatch.setattr(PyavVideo, "_read", misbehaving)


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("way", WAYS)
def test_infer_of_a_single_hostile_file(there: Path, tmp_path: Path, way: str) -> None:
    write_video(tmp_path / f"{way}.mp4", bright=True, seed=0)
    done = videogru("infer", tmp_path / f"{way}.mp4", "--model", "runs/videos-0001", "--format", "jsonl", *WATCHED[:2])
    assert done.code == 3
    assert REASONS[way] in json.loads(done.out)["error"]


@pytest.mark.usefixtures("hostile")
def test_infer_goes_on_after_hostile_files(there: Path, tmp_path: Path) -> None:
    names = ["a", "hang", "b", "leave", "segfault", "c"]
    for name in names:
        write_video(tmp_path / f"{name}.mp4", bright=True, seed=0)
    paths = [tmp_path / f"{name}.mp4" for name in names]
    done = videogru("infer", *paths, "--model", "runs/videos-0001", "--format", "jsonl", *WATCHED[:2])
    assert done.code == 3
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [Path(record["source"]).stem for record in records] == names
    for name, record in zip(names, records, strict=True):
        assert REASONS[name] in record["error"] if name in REASONS else record["error"] is None
    assert len({record["confidence"] for record in records if record["error"] is None}) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("hostile")
def test_training_and_evaluation_go_on_after_hostile_files(there: Path, tmp_path: Path) -> None:
    """With the weights of a training in which the same files cannot be opened."""
    table = ["source,label,split"]
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label, bright in (("left", False), ("right", True)):
            for name in [*(str(number) for number in range(count)), *(WAYS if bright else [])]:
                path = tmp_path / split / label / f"{name}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, bright=bright, seed=len(table))
                table.append(f"{path.relative_to(tmp_path)},{label},{split}")
    (tmp_path / "table.csv").write_text("\n".join(table))
    arguments = (*QUICK, *WATCHED, "--batch-size", "4", "--set", "train.num_workers=2", "--epochs", "2")
    done = videogru("train", "--dataset", tmp_path / "table.csv", *arguments, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    with (tmp_path / "run" / "bad_files.csv").open(newline="") as file:
        skipped = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    assert len(skipped) == len(WAYS)
    assert all(REASONS[Path(source).stem] in reason for source, reason in skipped.items())
    with (tmp_path / "run" / "predictions-test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all((Path(row["source"]).stem in WAYS) == bool(row["error"]) for row in rows)
    for path in tmp_path.rglob("*.mp4"):
        if path.stem in WAYS:
            path.write_bytes(b"broken")
    done = videogru("train", "--dataset", tmp_path / "table.csv", *arguments, "--out", tmp_path / "other")
    assert done.code == 0, done.err
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.usefixtures("hostile")
def test_too_many_dead_rows_stop_a_training(there: Path, tmp_path: Path) -> None:
    for label in "ab":
        shutil.copytree(f"videos/{label}", tmp_path / "clips" / label)
        write_video(tmp_path / "clips" / label / "leave.mp4", bright=True, seed=0)
        write_video(tmp_path / "clips" / label / "segfault.mp4", bright=True, seed=0)
    splits = ("--set", "data.val_fraction=0", "--set", "data.test_fraction=0", "--set", "data.max_bad=2")
    arguments = (*QUICK, *WATCHED, *splits, "--set", "train.num_workers=1")
    done = videogru("train", "--dataset", tmp_path / "clips", *arguments, "--out", tmp_path / "run")
    assert done.code == 2
    assert "max_bad" in done.err
