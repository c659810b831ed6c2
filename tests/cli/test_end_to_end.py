"""Training, evaluating and resuming as a new user does in the first hour, on small real or made data."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.command_line import KINDS, QUICK, videogru
from videogru.inference.predictions import read_csv


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_folder_holds_what_was_promised(there: Path, kind: str) -> None:
    run = there / "runs" / f"{kind}s-0001"
    for name in ("config.yaml", "splits.csv", "metrics.csv", "last.ckpt", "model.safetensors", "report.html"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    predictions = read_csv(run / "predictions-test.csv")
    scores = json.loads((run / "evaluation-test.json").read_text())
    right = float(np.mean(predictions.predicted == predictions.labels))
    assert scores["metrics"]["top1"]["value"] == pytest.approx(right)
    with (run / "splits.csv").open() as file:
        splits = {row["source"]: row["split"] for row in csv.DictReader(file)}
    assert len(splits) == 20
    assert set(splits.values()) == {"train", "val", "test"}
    assert {s for s in splits if splits[s] == "test"} == {str(source) for source in predictions.sources}


def test_eval_repeats_the_evaluation(there: Path, tmp_path: Path) -> None:
    first = (there / "runs/images-0001/predictions-test.csv").read_text()
    assert videogru("eval", "runs/images-0001", "--out", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "predictions-test.csv").read_text() == first
    alone = tmp_path / "alone.safetensors"
    shutil.copy("runs/images-0001/model.safetensors", alone)
    done = videogru("eval", alone, "--out", tmp_path / "alone")
    assert done.code == 0, done.err
    assert (tmp_path / "alone" / "predictions-test.csv").read_text() == first


def test_eval_on_other_data_says_which_rows_were_trained_on(there: Path, tmp_path: Path) -> None:
    with (there / "runs" / "images-0001" / "splits.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    table = there / "again.csv"
    rows = "".join(f"images/{line['source']},{line['label']}\n" for line in lines)
    table.write_text(f"source,label\n{rows}", encoding="utf-8")
    trained = sum(line["split"] == "train" for line in lines)
    done = videogru("eval", "runs/images-0001", "--dataset", table, "--out", tmp_path / "scores")
    table.unlink()
    assert done.code == 0
    assert f"note: {trained} of these {len(lines)} rows are of files that runs/images-0001 was trained on" in done.err
    assert "trained on" not in videogru("eval", "runs/images-0001", "--out", tmp_path / "own").err


def test_eval_on_other_data_with_fewer_classes_in_another_order(there: Path, tmp_path: Path) -> None:
    """Labels are matched by name: a table with class b alone is scored as class b."""
    shutil.copytree("images/b", tmp_path / "pictures")
    table = tmp_path / "only-b.csv"
    table.write_text("source,label,split\n" + "".join(f"pictures/{n}.png,b,test\n" for n in range(10)))
    one_class = videogru("eval", "runs/images-0001", "--dataset", table, "--out", tmp_path / "scores")
    assert one_class.code == 0, one_class.err
    assert set(read_csv(tmp_path / "scores" / "predictions-test.csv").labels.tolist()) == {1}
    table.write_text(table.read_text() + "pictures/0.png,a,test\n")
    done = videogru("eval", "runs/images-0001", "--dataset", table, "--out", tmp_path / "scores")
    assert done.code == 0, done.err
    written = read_csv(tmp_path / "scores" / "predictions-test.csv")
    assert written.labels.tolist() == [1] * 10 + [0]
    table.write_text("source,label,split\npictures/0.png,c,test\npictures/1.png,b,test\n")
    strange = videogru("eval", "runs/images-0001", "--dataset", table, "--out", tmp_path / "scores")
    assert strange.code == 2
    assert "c" in strange.err


def test_config_of_a_run_repeats_it(there: Path, tmp_path: Path) -> None:
    done = videogru("train", "--config", "runs/images-0001/config.yaml", "--out", tmp_path / "again")
    assert done.code == 0, done.err
    ours, theirs = (p / "predictions-test.csv" for p in (tmp_path / "again", there / "runs/images-0001"))
    assert ours.read_text() == theirs.read_text()
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["data"]["channels"] == 3


def test_a_run_folder_is_never_overwritten(there: Path) -> None:
    done = videogru("train", "--dataset", "images", "--out", "runs/images-0001", *QUICK)
    assert done.code == 2
    assert "--resume" in done.err


def test_resume_wants_the_same_data(there: Path, tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    shutil.copytree("images", data)
    size = ("--set", "data.frame_size=16", "--batch-size", "8")
    assert videogru("train", "--dataset", data, "--out", tmp_path / "run", *QUICK, *size).code == 0
    shutil.copy(data / "a" / "0.png", data / "a" / "zz.png")
    done = videogru("train", "--resume", tmp_path / "run")
    assert done.code == 2
    assert "splits" in done.err


def test_eval_wants_the_splits_of_the_run(there: Path, tmp_path: Path) -> None:
    """One more file would deal the rows anew, and training rows would be scored as test rows."""
    data = tmp_path / "pictures"
    shutil.copytree("images", data)
    size = ("--set", "data.frame_size=16", "--batch-size", "8")
    assert videogru("train", "--dataset", data, "--out", tmp_path / "run", *QUICK, *size).code == 0
    shutil.copy(data / "a" / "0.png", data / "a" / "zz.png")
    done = videogru("eval", tmp_path / "run")
    assert done.code == 2
    assert "splits" in done.err
    assert videogru("eval", tmp_path / "run", "--dataset", data).code == 2
    assert videogru("eval", tmp_path / "run", "--dataset", data, "--out", tmp_path / "all").code == 0
    assert len(read_csv(tmp_path / "all" / "predictions-test.csv")) == 21


def test_eval_of_another_split_leaves_the_runs_own_report(there: Path) -> None:
    run = there / "runs" / "images-0001"
    before = (run / "report.html").read_bytes()
    assert videogru("eval", run, "--split", "val").code == 0
    assert (run / "report.html").read_bytes() == before
    assert (run / "eval-val" / "report.html").is_file()


def test_unreadable_rows_show_in_eval(there: Path, tmp_path: Path) -> None:
    shutil.copytree("images", tmp_path / "pictures")
    (tmp_path / "pictures" / "a" / "3.png").write_bytes(b"broken")
    done = videogru("eval", "runs/images-0001", "--dataset", tmp_path / "pictures", "--out", tmp_path / "scores")
    assert done.code == 3
    assert "1 of 20 could not be read" in done.err


def test_split_folders(there: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        shutil.copytree("images", tmp_path / "sets" / split)
    size = ("--set", "data.frame_size=16", "--batch-size", "8")
    done = videogru("train", "--dataset", tmp_path / "sets", "--out", tmp_path / "run", *QUICK, *size)
    assert done.code == 0, done.err
    assert "2 classes, 20 train, 20 val, 20 test" in done.err
    (tmp_path / "sets" / "more").mkdir()
    done = videogru("train", "--dataset", tmp_path / "sets", *QUICK, *size)
    assert done.code == 2
    assert "more" in done.err


def test_a_damaged_state_cannot_be_resumed(there: Path, tmp_path: Path) -> None:
    shutil.copytree("runs/images-0001", tmp_path / "run")
    state = tmp_path / "run" / "last.ckpt"
    state.write_bytes(state.read_bytes()[:1000])
    done = videogru("train", "--resume", tmp_path / "run")
    assert done.code == 2
    assert "last.ckpt" in done.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--devices", "40"), "cannot be shared by 40 processes"),
        (("--devices", "0"), "train.devices = 0"),
        (("--devices", "-1"), "train.devices = -1"),
        (("--nodes", "2"), "MASTER_ADDR"),
    ],
)
def test_processes_that_cannot_be_started(there: Path, tmp_path: Path, flags: tuple[str, str], words: str) -> None:
    done = videogru("train", "--dataset", "images", *QUICK, "--out", tmp_path / "run", *flags)
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_before_its_first_state_begins_anew(there: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree("runs/images-0001", run)
    for left in ("last.ckpt", "model.safetensors", "metrics.csv", "report.html", "predictions-test.csv"):
        (run / left).unlink()
    (run / ".model.safetensors.123").write_bytes(b"half")
    (run / ".last.ckpt.partial").write_bytes(b"half")
    done = videogru("train", "--resume", run)
    assert done.code == 0, done.err
    assert "no state was saved" in done.err and "beginning anew" in done.err
    name = "predictions-test.csv"
    assert (run / name).read_text() == (there / "runs" / "images-0001" / name).read_text()
    assert not list(run.glob(".*"))


def test_resuming_a_finished_run_only_evaluates(there: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree("runs/images-0001", run)
    (run / "report.html").unlink()
    (run / "predictions-test.csv").unlink()
    before = (run / "model.safetensors").read_bytes()
    done = videogru("train", "--resume", run)
    assert done.code == 0, done.err
    assert "finished already" in done.err and "training on" not in done.err
    assert (run / "report.html").is_file() and (run / "predictions-test.csv").is_file()
    assert (run / "model.safetensors").read_bytes() == before


def test_a_run_that_was_killed_before_it_had_settings(there: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy("runs/images-0001/splits.csv", run)
    done = videogru("train", "--resume", run)
    assert done.code == 2
    assert "config.yaml" in done.err


def test_training_without_one_readable_clip_leaves_no_model(there: Path, tmp_path: Path) -> None:
    shutil.copytree("videos", tmp_path / "clips")
    rows = ["source,label,split,start_seconds,end_seconds"]
    rows += [f"clips/{c}/{n}.mp4,{c},{'train' if n < 7 else 'test'},100,200" for c in "ab" for n in range(10)]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    done = videogru("train", "--dataset", tmp_path / "table.csv", "--out", tmp_path / "run", *QUICK)
    assert done.code == 2
    assert "not one training clip" in done.err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_training_skips_and_lists_bad_files(there: Path, tmp_path: Path) -> None:
    data = tmp_path / "clips"
    shutil.copytree("videos", data)
    for number in range(3):
        (data / "a" / f"{number}.mp4").write_bytes(b"broken")
    arguments = ("--dataset", data, *QUICK, "--set", "data.frame_size=32", "--set", "data.num_frames=4")
    done = videogru("train", *arguments, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    with (tmp_path / "run" / "bad_files.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    evaluated = [read_csv(tmp_path / "run" / f"predictions-{split}.csv") for split in ("val", "test")]
    failed = sum(int(predictions.failed.sum()) for predictions in evaluated)
    assert {row["source"] for row in listed} <= {f"a/{number}.mp4" for number in range(3)}
    assert len(listed) + failed == 3
    done = videogru("train", *arguments, "--out", tmp_path / "strict", "--set", "data.max_bad=0")
    assert done.code == 2
    assert "max_bad" in done.err


def test_manifest_windows_and_splits(there: Path, tmp_path: Path) -> None:
    rows = ["source,label,split,group,start_seconds,end_seconds"]
    for number in range(6):
        shutil.copy(f"videos/a/{number}.mp4", tmp_path / f"{number}.mp4")
        split = "train" if number < 4 else "test"
        rows += [f"{number}.mp4,early,{split},{number},0.0,0.5", f"{number}.mp4,late,{split},{number},0.5,1.0"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows))
    done = videogru(
        "train", "--dataset", table, *QUICK, "--set", "data.frame_size=32", "--set", "data.num_frames=4",
        "--set", "data.val_fraction=0.25", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(read_csv(tmp_path / "run" / "predictions-test.csv")) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file,label\n0.png,a\n", ["source", "file"]),
        ("source,label\n0.png,a\n1.png,\n", [":3", "label"]),
        ("source,label,split,group\n0.png,a,train,x\n1.png,b,test,x\n", ["x", "split"]),
        ("source,label,split\n0.png,a,training\n1.png,b,test\n", [":2", "training"]),
        ("source,label\n../0.png,a\n1.png,b\n", [":2"]),
        ("source,label\n0.png,a\n1.png,a\n", ["class"]),
        ("", []),
    ],
)
def test_wrong_manifests(there: Path, tmp_path: Path, content: str, words: list[str]) -> None:
    for number in range(2):
        shutil.copy("images/a/0.png", tmp_path / f"{number}.png")
    (tmp_path / "table.csv").write_text(content)
    done = videogru("train", "--dataset", tmp_path / "table.csv", *QUICK)
    assert done.code == 2
    assert str(tmp_path) in done.err
    for word in words:
        assert word in done.err
