import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.command_line import videogru
from videogru.checkpoint.model_file import ModelCard
from videogru.config import DataConfig
from videogru.errors import ConfigError, ModelFileError
from videogru.inference.predictions import Predictions
from videogru.workflows import predict as answers


def quiet(text: str) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.mp4", "a.mp4", "scan.nii.gz", "notes.txt", ".hidden.mp4", "deep/c.mkv", "star[1].mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


@pytest.fixture
def predictions() -> Predictions:
    return Predictions(
        classes=("cat", "dog", 'é,"x"'),
        sources=np.array(["one.png", "two.png", "three.png"]),
        labels=np.array([-1, -1, -1]),
        probabilities=np.array([[0.2, 0.5, 0.3], [np.nan] * 3, [0.4, 0.4, 0.2]], dtype=np.float32),
        errors=np.array(["", "two.png: is empty", ""]),
        rows=np.arange(3),
    )


def test_folders_give_their_files_of_the_models_kind_sorted(folder: Path) -> None:
    said: list[str] = []
    found = ["a.mp4", "b.mp4", "star[1].mp4", "deep/c.mkv"]
    assert answers.expand(["."], "video", said.append) == [(path, None) for path in found]
    assert "1 files are not videos" in said[0]


def test_globs_files_and_repeats(folder: Path) -> None:
    def files(*asked: str) -> list[str]:
        return [path for path, problem in answers.expand(asked, "video", quiet) if problem is None]

    assert files("*.mp4", "a.mp4") == ["a.mp4", "b.mp4", "star[1].mp4"]
    assert files("star[1].mp4") == ["star[1].mp4"]
    assert files("absent.mp4") == ["absent.mp4"]
    assert files("de*") == ["deep/c.mkv"]


def test_what_the_model_was_built_for_stays() -> None:
    """A slab of three and three times the same slice are both three channels."""
    card = ModelCard.model_construct(
        kind="volume", data=DataConfig(slab=3, channels=3, series="7"), frame_size=112, in_channels=3
    )
    told = answers.data_settings(card, {"data.slab": 3, "data.axis": "coronal"})
    assert (told.slab, told.axis, told.series) == (3, "coronal", None)
    for key, value in (("data.slab", 1), ("data.channels", 1), ("data.frame_size", 64)):
        with pytest.raises(ConfigError, match=f"{key} = {value}, but the model was trained with"):
            answers.data_settings(card, {key: value})


def test_what_holds_nothing_gets_its_row(folder: Path) -> None:
    (glob_text, glob_problem), (other, none) = answers.expand(["*.webm", "a.mp4"], "video", quiet)
    assert glob_text == "*.webm"
    assert "pattern" in str(glob_problem)
    assert (other, none) == ("a.mp4", None)
    ((_, problem),) = answers.expand(["deep"], "image", quiet)
    assert "no image files" in str(problem)


def test_pairs_and_hidden_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("scan.hdr", "scan.img", "alone.img", ".cache/x.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path for path, _ in answers.expand(["."], "volume", quiet)] == ["alone.img", "scan.hdr"]


def test_records_name_the_most_probable_first(predictions: Predictions) -> None:
    first, second, third = answers.to_records(predictions, top_k=2)
    assert [entry["class"] for entry in first["top"]] == ["dog", 'é,"x"']
    assert (first["predicted"], first["confidence"]) == ("dog", 0.5)
    assert second == {
        "source": "two.png", "predicted": None, "confidence": None, "top": [], "error": "two.png: is empty"
    }  # fmt: skip
    assert third["predicted"] == "cat"
    assert len(answers.to_records(predictions, top_k=99)[0]["top"]) == 3


def test_forms_say_the_same(predictions: Predictions) -> None:
    records = answers.to_records(predictions, top_k=2)
    assert [json.loads(line) for line in answers._as_jsonl(records, False).splitlines()] == records
    rows = list(csv.DictReader(io.StringIO(answers._as_csv(records, False))))
    assert [row["predicted"] for row in rows] == ["dog", "", "cat"]
    assert [row["class_2"] for row in rows] == ['é,"x"', "", "dog"]
    assert [row["error"] for row in rows] == ["", "two.png: is empty", ""]
    table = answers._as_table(records, False)
    assert "error: is empty" in table
    assert table.count("\n") == 6


def test_out_is_checked_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder"):
        answers.check_writable(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        answers.check_writable(tmp_path / "no" / "answers.csv")
    answers.check_writable(tmp_path / "answers.csv")
    assert not (tmp_path / "answers.csv").exists()


def test_answers_never_replace_what_was_read(tmp_path: Path) -> None:
    for name in ("clip.mp4", "scan.nii.gz", "frame.png", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ConfigError, match="must not replace"):
            answers.check_writable(tmp_path / name)
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "odd").write_bytes(b"a video without a suffix")
    (tmp_path / "link").symlink_to(tmp_path / "odd")
    for out, read in (("IM0001", []), ("odd", [tmp_path / "odd"]), ("link", [None, str(tmp_path / "odd")])):
        with pytest.raises(ConfigError, match="must not replace"):
            answers.check_writable(tmp_path / out, read)
    (tmp_path / "answers.csv").write_text("of yesterday")
    answers.check_writable(tmp_path / "answers.csv", [tmp_path / "odd", "not there"])


@pytest.mark.parametrize("more", [(), ("--windows",), ("--explain",)])
def test_a_video_is_never_its_own_answer(workshop: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str]) -> None:
    monkeypatch.chdir(workshop)
    clip = workshop / "videos" / "a" / "0.mp4"
    before = clip.read_bytes()
    for command in ("infer", "stream"):
        if command == "infer" or not more:
            done = videogru(command, clip, "--out", clip, *more)
            assert done.code == 2 and "must not replace" in done.err
            assert clip.read_bytes() == before


def test_without_a_model_the_command_to_train_one_is_named(folder: Path) -> None:
    with pytest.raises(ModelFileError, match="videogru train --dataset adrenalmnist3d"):
        answers.newest_fitting(["scan.nii.gz"], quiet)
    with pytest.raises(ModelFileError, match="grid_digits"):
        answers.newest_fitting(["deep"], quiet)
    with pytest.raises(ModelFileError, match="--dataset NAME"):
        answers.newest_fitting(["notes.txt"], quiet)
