from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from videogru.config import Config, DataConfig
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.errors import ConfigError, DataError
from videogru.settings import resolve_config
from videogru.workflows import run_folder as runfolder
from videogru.workflows import train as runs
from videogru.workflows.evaluate import with_classes_of
from videogru.workflows.settings import settings_for_training


def test_run_numbers_go_on_after_the_highest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(runfolder.new_run("clips/", None)) == "runs/clips-0001"
    (tmp_path / "runs" / "clips-0007").mkdir()
    (tmp_path / "runs" / "clips-and-more-0009").mkdir()
    assert str(runfolder.new_run("/data/clips", None)) == "runs/clips-0008"
    assert str(runfolder.new_run("a b/my table.csv", None)) == "runs/my-table-0001"
    assert str(runfolder.new_run("../..", None)).startswith("runs/")


def test_a_folder_with_content_is_never_taken(tmp_path: Path) -> None:
    assert runfolder.new_run("x", tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="--resume"):
        runfolder.new_run("x", tmp_path / "full")
    with pytest.raises(ConfigError):
        runfolder.new_run("x", tmp_path / "full" / "file")


def test_precedence_of_settings(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("train: {epochs: 77, lr: 0.5, batch_size: 9}\n")
    config = settings_for_training(
        str(own), {"data.dataset": "adrenalmnist3d", "train.lr": 0.25}, {"train.batch_size": 3}
    )
    recipe = settings_for_training(None, {"data.dataset": "adrenalmnist3d"}, {})
    assert (config.train.epochs, config.train.lr, config.train.batch_size) == (77, 0.25, 3)
    assert config.data == recipe.data
    assert recipe.model.hidden_size != Config().model.hidden_size


def test_recipes_are_found_by_name(tmp_path: Path) -> None:
    config = settings_for_training("grid_digits", {"data.dataset": "adrenalmnist3d"}, {})
    assert config.data.frame_size == 64
    with pytest.raises(ConfigError, match="grid_digits"):
        settings_for_training("grid_digit", {"data.dataset": "adrenalmnist3d"}, {})


def test_a_saved_config_comes_back(tmp_path: Path) -> None:
    config = resolve_config(("x", {"data.dataset": "clips", "data.augment.flip": 0.5}))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert runfolder.run_config(tmp_path) == config


def test_labels_follow_the_models_class_order() -> None:
    manifest = build_manifest(Path(), ("b", "c"), ["1", "2", "3"], [0, 1, -1])
    corpus = Corpus("x", "image", ("b", "c"), manifest, None, None, 0, ())
    aligned = with_classes_of(corpus, ("c", "a", "b"), Path("m"))
    assert aligned.manifest.labels.tolist() == [2, 0, -1]
    with pytest.raises(DataError, match="does not know the classes c"):
        with_classes_of(corpus, ("a", "b"), Path("m"))
    same = with_classes_of(corpus, ("b", "c"), Path("m"))
    assert np.array_equal(same.manifest.labels, replace(manifest).labels)


def test_an_export_in_the_making_is_left_alone(tmp_path: Path) -> None:
    made = tmp_path / ".onnx-int8.1234.partial"
    made.mkdir()
    (made / "model.onnx").touch()
    (tmp_path / ".metrics.csv.partial").touch()
    runfolder.remove_unfinished(tmp_path)
    assert (made / "model.onnx").exists() and not (tmp_path / ".metrics.csv.partial").exists()


@pytest.mark.parametrize(
    ("kind", "classes", "augment", "less"),
    [
        ("video", ("Left", "other"), {"flip": 0.5}, "flip=0"),
        ("video", ("turn_right", "turn_left"), {"flip": 0.5}, "flip=0"),
        ("volume", ("left hip", "right hip"), {"flip": 0.5, "flip_axes": "xz"}, "flip_axes=z"),
        ("volume", ("left hip", "right hip"), {"flip": 0.5, "flip_axes": "yz"}, None),
        ("video", ("bright", "leftover"), {"flip": 0.5}, None),
        ("video", ("left", "right"), {}, None),
    ],
)
def test_a_flip_of_sides_is_told(kind: str, classes: tuple[str, ...], augment: dict, less: str | None) -> None:
    corpus = Corpus("x", kind, classes, build_manifest(Path(), classes, ["1"], [0]), None, None, 0, ())
    said = runs._note_on_mirrors(DataConfig(augment=augment), corpus)
    assert [line.rsplit("data.augment.", 1)[1] for line in said] == ([less] if less else [])
