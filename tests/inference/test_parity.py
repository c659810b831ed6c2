"""What `infer` says of a file is what training said of it in its last validation pass, on real data of each kind.

Files: clips of GRID digits, and scans and pictures written, without loss, from AdrenalMNIST3D; both are bundled. With
the slow tests also CIFAR-100, as torchvision reads it, where it is at hand.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.datasets import CIFAR100

from tests.support.command_line import videogru
from videogru.checkpoint.model_file import MODEL_FILE_NAME
from videogru.inference.predictor import Predictor
from videogru.training.task import SequenceTask

EACH = {"train": 10, "val": 14}  # rows
TINY = {"data.frame_size": 24, "model.encoder_width": 8, "model.hidden_size": 8, "train.num_workers": 0}
KINDS: dict[str, dict[str, object]] = {
    # As in the recipe: frames are drawn and augmented in training; none of that may reach a validation.
    "video": {
        "data.num_frames": 6,
        "data.augment.flip": 0.5,
        "model.frame_differences": "both",
        "train.ema_decay": 0.9,
    },
    "volume": {"data.num_frames": 8, "data.slab": 3, "data.augment.noise": 0.1, "model.use_gaps": True},
    "image": {"data.channels": 1, "data.augment.cutmix": 0.5, "model.seq": "rows"},
    # As in the recipe; pixels are not resized.
    "cifar100": {
        "data.frame_size": 32,
        "data.augment.flip": 0.5,
        "data.augment.translate": 0.125,
        "data.augment.cutmix": 0.5,
        "model.encoder": "airbench",
        "model.seq": "grid",
        "train.optimizer": "muon",
    },
}
CIFAR_CLASSES = 4


def write_cifar(folder: Path, packed: Path) -> list[tuple[str, str, str]]:
    """Test images of some classes as PNG files; rows of the table."""
    subprocess.run([sys.executable, packed / "unpack.py", folder / "official"], check=True, capture_output=True)
    images = CIFAR100(folder / "official", train=False)
    classes = [[k for k, label in enumerate(images.targets) if label == wanted] for wanted in range(CIFAR_CLASSES)]
    drawn = iter(places for together in zip(*classes, strict=True) for places in together)  # classes in turn
    rows = []
    for split, count in EACH.items():
        for place in [next(drawn) for _ in range(count)]:
            images[place][0].save(folder / f"{split}{place}.png")
            rows.append((f"{split}{place}.png", images.classes[images.targets[place]], split))
    return rows


def write_sources(folder: Path, kind: str, request: pytest.FixtureRequest) -> Path:
    """A table of real sources, beside them."""
    repository = request.getfixturevalue("repository")
    table = folder / "table.csv"
    rows = []
    if kind == "cifar100":
        rows = write_cifar(folder, request.getfixturevalue("shared_data") / "cifar100")
    elif kind == "video":
        home = repository / "datasets" / "grid_digits"
        with (home / "manifest.csv").open(newline="", encoding="utf-8") as file:
            listed = list(csv.DictReader(file))
        for split, count in EACH.items():
            for row in [row for row in listed if row["split"] == split][:count]:
                target = folder / row["source"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((home / row["source"]).read_bytes())
                rows.append((row["source"], row["label"], split))
    else:
        with np.load(repository / "datasets" / "adrenalmnist3d" / "adrenalmnist3d.npz") as arrays:
            for split, count in EACH.items():
                labels = arrays[f"{split}_labels"][:, 0]
                chosen = [*np.flatnonzero(labels == 0)[: count // 2], *np.flatnonzero(labels == 1)[: count // 2]]
                for place in chosen:
                    voxels, name = arrays[f"{split}_images"][place], f"{split}{place}"
                    if kind == "volume":
                        name += ".nii.gz"
                        nibabel.Nifti1Image(voxels, np.diag([1.0, 1.2, 2.0, 1.0])).to_filename(folder / name)
                    else:
                        name += ".png"
                        Image.fromarray(voxels[14]).save(folder / name)
                    rows.append((name, "hyperplasia" if labels[place] else "normal", split))
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("source", "label", "split"), *rows])
    return table


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow if kind == "cifar100" else ()) for kind in KINDS],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A run of two epochs of a kind, its files of validation, and the logits of its last pass over them."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    table = write_sources(folder, kind, request)
    noted: list[dict[int, torch.Tensor]] = [{}]
    real_read, real_scores = SequenceTask._read, SequenceTask.validation_scores

    def read(task, batch):
        found = real_read(task, batch)
        if not task.training:
            noted[-1] |= dict(zip(batch.indices.tolist(), found[2].float(), strict=True))
        return found

    def scores(task):
        noted.append({})
        return real_scores(task)

    words = [word for key, value in {**TINY, **KINDS[kind]}.items() for word in ("--set", f"{key}={value}")]
    fixed = ("--epochs", "2", "--batch-size", "5", "--set", "train.precision=fp32", "--set", "train.keep=last")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(SequenceTask, "_read", read)
        patch.setattr(SequenceTask, "validation_scores", scores)
        done = videogru("train", "--dataset", table, "--out", folder / "run", *fixed, *words)
    assert done.code == 0, done.err
    with (folder / "run" / "splits.csv").open(newline="", encoding="utf-8") as file:
        sources = [row["source"] for row in csv.DictReader(file)]
    logged = noted[1]  # of the second epoch
    assert len(noted) == 3 and len(logged) == EACH["val"]
    return folder, {folder / sources[row]: logits for row, logits in logged.items()}


def test_infer_says_what_training_said(trained) -> None:
    folder, logged = trained
    paths, logits = list(logged), torch.stack(list(logged.values()))
    said = Predictor.from_file(folder / "run").predict_paths(paths, num_workers=0)
    assert not said.failed.any()
    assert said.predicted.tolist() == logits.argmax(dim=1).tolist()
    # Logits are known up to what softmax takes out.
    difference = np.log(said.probabilities.astype(np.float64)) - logits.double().log_softmax(dim=1).numpy()
    assert float(np.abs(difference).max()) < 1e-4
    assert float(logits.std(dim=0).max()) > 1e-3  # the files differ for this model


def test_the_command_names_the_same_classes(trained) -> None:
    folder, logged = trained
    answer = videogru(
        "infer", *logged, "--model", folder / "run", "--format", "jsonl", "--set", "data.decode_timeout_seconds=0"
    )
    assert answer.code == 0, answer.err
    rows = {Path(row["source"]).name: row for row in map(json.loads, answer.out.splitlines())}
    classes = Predictor.from_file(folder / "run").card.classes
    flips = [path for path, logits in logged.items() if rows[path.name]["predicted"] != classes[int(logits.argmax())]]
    assert not flips


def test_a_planted_mean_is_refused(trained, tmp_path: Path) -> None:
    folder, _ = trained
    whole = folder / "run" / MODEL_FILE_NAME
    assert videogru("model", "verify", whole, "--backend", "torch").code == 0
    with safe_open(whole, framework="pt") as file:
        card = json.loads(file.metadata()["videogru"])
    card["mean"] = [value + 0.02 for value in card["mean"]]
    planted = tmp_path / "planted.safetensors"
    save_file(load_file(whole), planted, metadata={"videogru": json.dumps(card)})
    refused = videogru("model", "verify", planted, "--backend", "torch")
    assert refused.code == 4 and "FAILED" in refused.out
