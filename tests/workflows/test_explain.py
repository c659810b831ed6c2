"""`infer --explain` as typed: records, pictures, tables, and what it refuses."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.command_line import videogru
from videogru.inference.explain.figure import TILES, shown_frames, shown_steps

RUNS = {"video": "runs/videos-0001", "volume": "runs/volumes-0001", "image": "runs/images-0001"}
INPUT = {"video": "videos/a/0.mp4", "volume": "volumes/a/0.nii.gz", "image": "images/a/0.png"}


@pytest.mark.parametrize("kind", ["video", "volume", "image"])
def test_each_kind_has_steps_and_a_picture(there: Path, kind: str) -> None:
    plain = videogru("infer", INPUT[kind], "--model", RUNS[kind], "--format", "jsonl")
    done = videogru("infer", INPUT[kind], "--model", RUNS[kind], "--format", "jsonl", "--explain")
    assert (done.code or 0) == 0, done.err
    record, wanted = json.loads(done.out), json.loads(plain.out)
    assert record["predicted"] == wanted["predicted"]
    assert record["confidence"] == pytest.approx(wanted["confidence"], abs=1e-5)
    steps = record["explanation"]
    assert all(set(step) == {"position", "unit", "contribution"} for step in steps)
    assert len(steps) == (1 if kind == "image" else 6)
    assert {step["unit"] for step in steps} == {{"video": "seconds", "volume": "mm", "image": "index"}[kind]}
    positions = [step["position"] for step in steps]
    assert positions == sorted(positions)
    if kind == "volume":  # twelve slices of 2.5 mm in six segments
        assert np.diff(positions).tolist() == pytest.approx([5.0] * 5)
    assert record["method"] == "left out"
    assert record["baseline"] is None
    assert record["picture"] == "explanations/0.png"
    with Image.open(record["picture"]) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    assert "1 picture in explanations/" in done.err


def test_a_bad_input_gets_its_row_and_no_picture_stands_for_two(there: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no scan")
    out = tmp_path / "answers.csv"
    inputs = ("volumes/a/0.nii.gz", bad, "volumes/b/0.nii.gz", "volumes/none/*.nii")
    done = videogru("infer", *inputs, "--model", RUNS["volume"], "--explain", "--out", out, "--top-k", "2")
    assert done.code == 3, done.err
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert [Path(row["picture"]).name for row in rows] == ["answers-0.png", "", "answers-0-2.png", ""]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["answers-0-2.png", "answers-0.png"]
    assert len(json.loads(rows[0]["explanation"])) == 6
    assert json.loads(rows[1]["explanation"]) == []
    assert rows[0]["class_2"]
    assert "2 of 4 inputs failed" in done.err


def test_a_table_names_the_strongest(there: Path) -> None:
    done = videogru("infer", INPUT["volume"], "--model", RUNS["volume"], "--explain", "--top-k", "2")
    lines = done.out.splitlines()
    assert "spoke for it most" in lines[0]
    assert " mm +" in lines[1] or lines[1].endswith("no step")
    assert len(lines) == 3


@pytest.mark.parametrize("other", [("--views", "2x1"), ("--windows",)])
def test_one_clip_at_a_time(there: Path, other: tuple[str, ...]) -> None:
    done = videogru("infer", INPUT["video"], "--model", RUNS["video"], "--explain", *other)
    assert done.code == 2
    assert "leave --windows and --views out" in done.err


def test_a_picture_that_cannot_be_written_is_told(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explanations").write_text("a file in the way")
    source, model = there / INPUT["image"], there / RUNS["image"]
    monkeypatch.chdir(tmp_path)
    done = videogru("infer", source, "--model", model, "--explain")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_a_causal_model_tells_what_adds_up(there: Path, tmp_path: Path) -> None:
    trained = videogru(
        *("train", "--dataset", "volumes", "--epochs", "1", "--out", tmp_path / "run"),
        *("--set", "model.temporal=causal", "--set", "model.pooling=attention", "--set", "model.encoder_width=8"),
        *("--set", "data.frame_size=32", "--set", "data.num_frames=6", "--set", "train.num_workers=0"),
    )
    assert (trained.code or 0) == 0, trained.err
    out = tmp_path / "answers.jsonl"
    done = videogru("infer", INPUT["volume"], "--model", tmp_path / "run", "--explain", "--out", out)
    assert (done.code or 0) == 0, done.err
    record = json.loads(out.read_text())
    assert record["method"] == "prefixes"
    parts = [step["contribution"] for step in record["explanation"]]
    assert record["baseline"] + sum(parts) == pytest.approx(record["logit"], abs=1e-5)  # as rounded


def test_the_sheet_holds_what_mattered() -> None:
    assert shown_steps(5, [4, 0]) == [0, 1, 2, 3, 4]
    assert shown_steps(TILES, []) == list(range(TILES))
    for steps, top in ((100, [50, 51, 52]), (1000, [1, 2, 3]), (29, [28, 27, 1])):
        shown = shown_steps(steps, top)
        assert len(set(shown)) == TILES
        assert shown == sorted(shown)
        assert set(top) <= set(shown)


def test_frames_are_shown_as_they_are() -> None:
    color = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    np.testing.assert_array_equal(shown_frames(color), color.permute(0, 2, 3, 1).numpy())
    slab = torch.rand(2, 5, 4, 5)
    gray = shown_frames(slab)
    assert gray.shape == (2, 4, 5, 3)
    np.testing.assert_array_equal(gray[..., 0], (slab[:, 2] * 255).round().to(torch.uint8).numpy())
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
