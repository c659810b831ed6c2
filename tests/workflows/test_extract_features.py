"""Encode once: features equal the uncached path, are reused as long as nothing changed, and train complete models."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.command_line import KINDS, videogru, write_picture, write_video, write_volume
from videogru.checkpoint.model_file import MODEL_FILE_NAME, make_card, read_model, write_model
from videogru.config import Config
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.feature_dataset import FeatureDataset
from videogru.data.loading.feature_store import ARRAY, INDEX, FeatureWriter, read_index
from videogru.data.manifests.corpus import open_corpus
from videogru.errors import DataError, Interrupted
from videogru.inference.predictions import read_csv
from videogru.models.classifier import Classifier
from videogru.settings import resolve_config
from videogru.training import features as encoded_module
from videogru.training.features import features_of, open_features
from videogru.workflows.extract_features import encode_data

QUICK = ("--epochs", "2", "--set", "train.precision=fp32", "--set", "model.hidden_size=6")


def model_file(path: Path, kind: str = "image", *, seed: int = 0, **changes: object) -> Path:
    """An untrained model with statistics of its own in its norms."""
    settings = {"data.frame_size": 16, "data.num_frames": 5, "data.val_fraction": 0.3, "model.encoder_width": 4}
    asked = {key.replace("__", "."): value for key, value in changes.items()}
    config: Config = resolve_config(("test", {**settings, "model.hidden_size": 5, **asked}))
    data = config.data.for_kind(kind)
    torch.manual_seed(seed)
    shape = {"mean": (0.4,) * data.channels, "std": (0.3,) * data.channels}
    model = Classifier(config.model, in_channels=data.channels, frame_size=16, num_classes=2, **shape).train()
    with torch.no_grad():
        frames = torch.rand(4, 3, data.channels, 16, 16)
        model(frames, torch.tensor([3, 3, 3, 2]), torch.ones(4, 3))
    write_model(path, model.eval(), make_card(model, kind=kind, classes=("a", "b"), data=data))
    return path


def sources(folder: Path, kind: str, *, each: int = 6) -> Path:
    suffix, write = KINDS[kind]
    for label, flag in (("a", True), ("b", False)):
        (folder / label).mkdir(parents=True)
        for number in range(each):
            write(folder / label / f"{number}{suffix}", flag, number + 100 * flag)
    return folder


def encode(data: Path, model: Path, out: Path):
    return encode_data(str(data), model, None, out, progress=False, say=lambda text: None)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("video", {"model__frame_differences": "both", "model__use_gaps": True}),
        ("video", {"model__seq": "rows"}),
        ("volume", {"data__sampling": "all", "data__slab": 3}),
        ("volume", {"model__cell": "convgru"}),
        ("image", {"model__seq": "grid"}),
    ],
)
def test_logits_from_features_are_those_of_the_files(tmp_path: Path, kind: str, changes: dict) -> None:
    data = sources(tmp_path / "data", kind, each=3)
    if kind == "video":  # clips of other lengths, and a padded one
        write_video(data / "a" / "long.mp4", bright=True, seed=3, frames=30)
        write_video(data / "b" / "short.mp4", bright=False, seed=4, frames=3)
    if kind == "volume":
        shutil.copy(data / "a" / "0.nii.gz", data / "b" / "copy.nii.gz")
    done = encode(data, model_file(tmp_path / "model.safetensors", kind, **changes), tmp_path / "features")
    found = open_features(tmp_path / "features")
    corpus = open_corpus(found.settings.data)
    rows = np.arange(len(corpus.manifest))
    assert done.rows == len(rows) and not done.bad
    features = features_of(found, corpus, rows)
    assert features.array.shape[1:] == found.settings.step
    keys = [(0, int(row)) for row in rows]
    clips = ClipDataset(corpus, data=found.settings.data).__getitems__(keys).batch
    maps = FeatureDataset(corpus, features, data=found.settings.data).__getitems__(keys).batch
    for name in ("lengths", "indices", "labels", "gaps"):
        assert torch.equal(getattr(clips, name), getattr(maps, name)), name
    with torch.no_grad():
        expected = found.classifier(clips.frames, clips.lengths, clips.gaps)
        given = found.classifier.from_maps(maps.frames, maps.lengths, maps.gaps)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-4  # else everything would be equal


def test_the_mean_is_kept_where_nothing_else_is_read(tmp_path: Path) -> None:
    data = sources(tmp_path / "data", "image", each=2)
    for seq, step in (("frames", (16, 1, 1)), ("rows", (16, 2, 2))):
        encode(data, model_file(tmp_path / f"{seq}.safetensors", model__seq=seq), tmp_path / seq)
        settings = open_features(tmp_path / seq).settings
        assert settings.step == step
        assert (tmp_path / seq / ARRAY).stat().st_size == 4 * 4 * np.prod(step)


def test_trained_from_features_it_is_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources(tmp_path / "data", "image", each=10)
    model = model_file(tmp_path / "model.safetensors")
    assert videogru("encode", "data", "--model", model, "--out", "features").code == 0
    more = (
        "--dataset",
        "data",
        "--set",
        "train.keep=last",
        "--set",
        "model.cell=lstm",
        "--set",
        "model.pooling=attention",
        "--seed",
        "3",
    )
    done = videogru("train", "--features", "features", "--out", "run", *QUICK, *more)
    assert done.code == 0, done.err
    ours, theirs = load_file(tmp_path / "run" / MODEL_FILE_NAME), load_file(model)
    kept = [name for name in theirs if name.startswith("encoder.")]
    assert kept and all(torch.equal(ours[name], theirs[name]) for name in kept)
    _, card = read_model(tmp_path / "run" / MODEL_FILE_NAME)
    assert (card.model.cell, card.model.pooling, card.mean) == ("lstm", "attention", (0.4, 0.4, 0.4))
    # What training logged and scored of features is what the whole model says of the files.
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))[-1]
    said = read_csv(tmp_path / "run" / "predictions-val.csv")
    loss = -np.log(said.probabilities[np.arange(len(said)), said.labels]).mean()
    assert float(logged["val_loss"]) == pytest.approx(loss, abs=1e-4)
    assert videogru("eval", "run", "--split", "val", "--out", "files").code == 0
    of_files = read_csv(tmp_path / "files" / "predictions-val.csv")
    np.testing.assert_allclose(np.log(said.probabilities), np.log(of_files.probabilities), atol=1e-4)
    assert said.predicted.tolist() == of_files.predicted.tolist()
    answer = videogru("infer", "data/a/0.png", "--model", "run")
    assert answer.code == 0 and "0.png" in answer.out
    assert videogru("model", "verify", "run", "--backend", "torch").code == 0
    again = videogru("train", "--resume", "run")
    assert again.code == 0 and "finished already" in again.err
    repeated = videogru("train", "--config", "run/config.yaml", "--out", "again")
    assert repeated.code == 0, repeated.err
    assert all(torch.equal(ours[name], t) for name, t in load_file(tmp_path / "again" / MODEL_FILE_NAME).items())


def test_only_what_changed_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, model = sources(tmp_path / "data", "image"), model_file(tmp_path / "model.safetensors")
    assert encode(data, model, tmp_path / "features").done == 12
    assert encode(data, model, tmp_path / "features").done == 0
    os.utime(data / "a" / "1.png", (1, 1))  # touched: the bytes are the same
    shutil.copy(data / "a" / "2.png", data / "spare.png")
    (data / "spare.png").replace(data / "a" / "2.png")  # and so they are in another file
    assert encode(data, model, tmp_path / "features").done == 0
    corpus = open_corpus(open_features(tmp_path / "features").settings.data)
    row = int(corpus.manifest.rows("test")[0])
    write_picture(corpus.manifest.path(row), bright=True, seed=77)
    refused = videogru("train", "--features", "features", *QUICK)
    assert refused.code == 2
    assert "1 of" in refused.err and "videogru encode" in refused.err and "--out features" in refused.err
    assert not Path("runs").exists()
    assert encode(data, model, tmp_path / "features").done == 1
    found = open_features(tmp_path / "features")
    features = features_of(found, corpus, np.array([row]))
    clip = ClipDataset(corpus, data=found.settings.data).__getitems__([(0, row)]).batch
    with torch.no_grad():
        maps = found.classifier.maps(clip.frames, clip.lengths)
    np.testing.assert_allclose(features.read(row)[:, :, 0, 0], maps[0].mean((-2, -1)), atol=1e-6)


def test_other_versions_or_weights_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = sources(tmp_path / "data", "image", each=4), model_file(tmp_path / "model.safetensors")
    encode(data, model, tmp_path / "features")
    found = open_features(tmp_path / "features")
    corpus = open_corpus(found.settings.data)
    with monkeypatch.context() as patch:
        patch.setattr(encoded_module, "versions_of", lambda kind: {"torch": "99"})
        with pytest.raises(DataError, match="8 of 8 rows"):
            features_of(found, corpus, np.arange(8))
    other = model_file(tmp_path / "other.safetensors", seed=1)
    refused = videogru("encode", data, "--model", other, "--out", tmp_path / "features")
    assert refused.code == 2 and "another" in refused.err
    shutil.copy(other, tmp_path / "features" / MODEL_FILE_NAME)
    refused = videogru("train", "--features", tmp_path / "features")
    assert refused.code == 2 and "weights" in refused.err and "videogru encode" in refused.err


def test_a_bad_file_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, model = sources(tmp_path / "data", "image", each=8), model_file(tmp_path / "model.safetensors")
    whole = encode(data, model, tmp_path / "whole")
    content = (data / "a" / "0.png").read_bytes()
    (data / "a" / "0.png").write_bytes(content[:60])
    (data / "a" / "zz.png").write_bytes(b"no picture")
    done = videogru("encode", "data", "--model", model, "--out", "features")
    assert done.code == 3 and "2 cannot be read" in done.out and "a/0.png" in done.err
    found = open_features(tmp_path / "features")
    corpus = open_corpus(found.settings.data)
    names = corpus.manifest.sources.tolist()
    features = features_of(found, corpus, np.arange(len(names)))
    assert {names[row] for row, entry in features.entries.items() if entry.error} == {"a/0.png", "a/zz.png"}
    before = features_of(open_features(whole.folder), corpus, np.array([names.index("b/3.png")]))
    # One row fewer in its batch: the last bit of a sum may be another.
    np.testing.assert_allclose(
        features.read(names.index("b/3.png")), before.read(names.index("b/3.png")), rtol=0, atol=1e-6
    )
    trained = videogru("train", "--features", "features", "--out", "run", *QUICK)
    assert trained.code == 0, trained.err
    (data / "a" / "0.png").write_bytes(content)
    assert encode(data, model, tmp_path / "features").bad == 1


def test_an_interrupted_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = sources(tmp_path / "data", "video", each=20), model_file(tmp_path / "model.safetensors", "video")
    whole = encode(data, model, tmp_path / "whole")
    real, calls = FeatureWriter.add, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 36:  # in the second batch
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "add", stopped)
        with pytest.raises(Interrupted, match="35 of 40"):
            encode(data, model, tmp_path / "cut")
    # A kill leaves a line that is cut short, and steps without a line.
    with (tmp_path / "cut" / INDEX).open("ab") as index, (tmp_path / "cut" / ARRAY).open("ab") as array:
        index.write(b'{"key": "abc", "sou')
        array.write(b"\x01" * 1001)
    assert encode(data, model, tmp_path / "cut").done == 5
    corpus = open_corpus(open_features(whole.folder).settings.data)
    one, other = (features_of(open_features(tmp_path / name), corpus, np.arange(40)) for name in ("whole", "cut"))
    assert len(one.array) == len(other.array) == 40 * 5
    for row in range(40):
        np.testing.assert_array_equal(one.read(row), other.read(row))


@pytest.mark.parametrize(
    "change",
    [{"offset": "0"}, {"length": 1.5}, {"gaps": ["a"]}, {"gaps": [0.0]}, {"gaps": [float("nan")] * 5}, {"key": ["a"]}],
)
def test_an_edited_line_does_not_count(tmp_path: Path, change: dict) -> None:
    line = {"key": "k", "source": "s", "content": "c", "stamp": "t", "offset": 0, "length": 5, "gaps": [0.0] * 5}
    (tmp_path / ARRAY).write_bytes(bytes(4 * 5))
    for told, count in ((line, 1), (line | change, 0)):
        (tmp_path / INDEX).write_text(json.dumps(told) + "\n")
        assert len(read_index(tmp_path, (1, 1, 1))) == count


def test_damage_is_noticed(tmp_path: Path) -> None:
    data, model = sources(tmp_path / "data", "volume", each=2), model_file(tmp_path / "model.safetensors", "volume")
    encode(data, model, tmp_path / "features")
    with (tmp_path / "features" / ARRAY).open("r+b") as file:
        file.seek(5)
        file.write(b"\xff")
    found = open_features(tmp_path / "features")
    features = features_of(found, open_corpus(found.settings.data), np.arange(4))
    first = min(features.entries, key=lambda row: features.entries[row].offset)
    with pytest.raises(DataError, match="damaged"):
        features.read(first)
    with (tmp_path / "features" / ARRAY).open("r+b") as file:
        file.truncate(100)  # then rows are missing, and are made again
    with pytest.raises(DataError, match="not encoded"):
        features_of(found, open_corpus(found.settings.data), np.arange(4))
    assert encode(data, model, tmp_path / "features").done >= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "data.frame_size=24"], "data.frame_size = 24"),
        (["--set", "data.augment.flip=0.5"], "nothing augments features"),
        (["--set", "data.split_seed=3"], "data.split_seed"),
        (["--encoder", "conv2"], "model.encoder = conv2"),
        (["--set", "model.frame_differences=past"], "model.frame_differences"),
        (["--set", "model.weights=imagenet"], "model.weights"),
        (["--seq", "rows"], "only the means were kept"),
        (["--set", "model.cell=convgru"], "only the means were kept"),
        (["--set", "train.compile=true"], "train.compile"),
        (["--dataset", "elsewhere"], "data.dataset"),
    ],
)
def test_what_the_features_fix_cannot_be_set(there_encoded: Path, words: list[str], said: str) -> None:
    refused = videogru("train", "--features", there_encoded, *words)
    assert refused.code == 2 and said in refused.err, refused.err


@pytest.fixture(scope="module")
def there_encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoded")
    encode(sources(place / "data", "image"), model_file(place / "model.safetensors"), place / "features")
    return place / "features"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, there_encoded: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    model, data = there_encoded.parent / "model.safetensors", there_encoded.parent / "data"
    refused = videogru("encode", data, "--model", model, "--out", tmp_path / "mine")
    assert refused.code == 2 and "holds no features" in refused.err
    (tmp_path / "mine" / "settings.json").write_text(json.dumps({"format": 1}))
    assert videogru("train", "--features", tmp_path / "mine").code == 2
    scans = tmp_path / "scans"
    (scans / "a").mkdir(parents=True), (scans / "b").mkdir()
    write_volume(scans / "a" / "0.nii.gz", large=True, seed=0)
    write_volume(scans / "b" / "0.nii.gz", large=False, seed=1)
    refused = videogru("encode", scans, "--model", model, "--out", tmp_path / "new")
    assert refused.code == 2 and "reads images" in refused.err and not (tmp_path / "new").exists()
