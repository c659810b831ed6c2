"""`videogru export` on a model trained on real scans: what is kept says the same, the rest is refused."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from tests.support.command_line import videogru
from videogru.checkpoint.model_file import read_model
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.errors import GateRefused, ModelFileError
from videogru.export import acceptance as gate
from videogru.export import clip_graph as graph
from videogru.inference.predictions import read_csv
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Normalize
from videogru.runtime.backends import open_exported
from videogru.runtime.export_folder import read_export_card
from videogru.runtime.pt2 import load_program
from videogru.workflows import export
from videogru.workflows.evaluate import open_run

for _package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(_package)


@pytest.fixture(scope="module", autouse=True)
def _sizes_stay_free() -> Iterator[None]:
    """The tests' check of shapes compares sizes, which would freeze them while a graph is traced."""

    def unchecked(trace):
        def traced(*given, **how):
            before = jaxtyping.config.jaxtyping_disable  # one calls the other
            jaxtyping.config.update("jaxtyping_disable", True)
            try:
                return trace(*given, **how)
            finally:
                jaxtyping.config.update("jaxtyping_disable", before)

        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", unchecked(torch.onnx.export))
        patch.setattr(torch.export, "export", unchecked(torch.export.export))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few steps on AdrenalMNIST3D."""
    place = tmp_path_factory.mktemp("trained") / "run"
    done = videogru(
        *("train", "--dataset", "adrenalmnist3d", "--epochs", "1", "--out", place, "--batch-size", "64"),
        *("--set", "model.encoder_width=8", "--set", "model.hidden_size=8", "--set", "data.num_frames=8"),
        *("--set", "train.num_workers=0", "--lr", "0.01"),
    )
    assert done.code == 0, done.err
    return place


def exported(run: Path, out: Path, *words: str) -> Path:
    done = videogru("export", run, *words, "--out", out)
    assert done.code == 0, done.err
    assert "exported" in done.out
    return out


@pytest.fixture(scope="module")
def onnx_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("onnx") / "fp32", "--format", "onnx")


@pytest.fixture(scope="module")
def int8_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(
        run,
        tmp_path_factory.mktemp("int8") / "int8",
        *("--format", "openvino", "--precision", "int8", "--max-drop", "100"),
    )


def test_an_export_evaluates_to_what_pytorch_says(run: Path, onnx_folder: Path, tmp_path: Path) -> None:
    said = videogru("eval", onnx_folder, "--split", "val", "--out", tmp_path)
    assert said.code == 0, said.err
    ours, torchs = read_csv(tmp_path / "predictions-val.csv"), read_csv(run / "predictions-val.csv")
    assert (ours.predicted == torchs.predicted).all()
    np.testing.assert_allclose(ours.probabilities, torchs.probabilities, atol=1e-5)
    card = json.loads((onnx_folder / "card.json").read_text())
    assert card["checks"]["flips"] == 0
    assert card["checks"]["samples"] == len(torchs)
    assert card["checks"]["accuracy"] == pytest.approx(np.mean(torchs.predicted == torchs.labels))
    assert len(card["checks"]["shapes"]) >= 4
    assert card["labels"] == list(torchs.classes)


def test_int8_keeps_nearly_everything(run: Path, int8_folder: Path) -> None:
    card = json.loads((int8_folder / "card.json").read_text())
    assert abs(card["checks"]["accuracy_drop_points"]) <= 5  # of 98 scans, one is a point
    assert card["checks"]["calibration_clips"] == export.CALIBRATION_CLIPS
    assert 0 < card["checks"]["largest_difference"] < gate.TOLERANCE["int8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "precision", "share"),
    [("onnx", "fp16", 0.6), ("openvino", "fp32", 1.3), ("openvino", "fp16", 0.7), ("onnx", "int8", 0.8)],
)
def test_every_format_and_precision(run: Path, tmp_path: Path, form: str, precision: str, share: float) -> None:
    """share: of the fp32 graph's size at most; this model is small beside the names in a graph."""
    folder = exported(run, tmp_path / "made", "--format", form, "--precision", precision, "--max-drop", "3")
    card = json.loads((folder / "card.json").read_text())
    size = sum((folder / name).stat().st_size for name in card["files"])
    assert size < share * max(400_000, (run / "model.safetensors").stat().st_size)


@pytest.mark.slow
def test_pt2_in_half_precision(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "pt2", "--format", "pt2", "--precision", "fp16", "--max-drop", "2")
    card = json.loads((folder / "card.json").read_text())
    assert card["checks"]["largest_difference"] < 0.05


def test_a_program_that_holds_a_pickle_of_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        content = io.BytesIO()
        torch.save(Hostile(), content)
        archive.writestr("model/data/sample_inputs/model.pt", content.getvalue())
    with pytest.raises(ModelFileError, match="pickle"):
        load_program(tmp_path / "model.pt2", "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("which", ["onnx", "int8"])
def test_the_example_runs_where_torch_is_not(
    request: pytest.FixtureRequest, run: Path, tmp_path: Path, which: str
) -> None:
    folder = request.getfixturevalue(f"{which}_folder")
    model, settings, corpus = open_run(run, dataset=None, data_dir=None)
    row = int(corpus.manifest.rows("test")[0])
    predictor = Predictor.from_file(model, device="cpu", data=settings.data)
    batch = ClipDataset(corpus, data=predictor.data).__getitems__([(0, row)]).batch
    assert batch is not None
    np.save(tmp_path / "clip.npy", batch.frames[0].numpy())
    for banned in ("torch", "videogru"):
        (tmp_path / f"{banned}.py").write_text("raise ImportError('not here')\n")
    shutil.copytree(folder, tmp_path / "elsewhere")
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "elsewhere" / "example.py"), str(tmp_path / "clip.npy")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    label, probability = ended.stdout.strip().rsplit(" ", 1)
    wanted = Predictor.from_file(folder, data=settings.data).predict(corpus, np.array([row]), num_workers=0)
    assert label == wanted.classes[int(wanted.predicted[0])]
    assert float(probability) == pytest.approx(float(wanted.confidence[0]), abs=2e-3)


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
def test_a_wrong_mean_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    honest = graph.scanned

    def planted(classifier, **how):
        copy = honest(classifier, **how)
        copy.normalize = Normalize(tuple(value + 0.05 for value in classifier.mean), classifier.std)
        return copy

    monkeypatch.setattr(graph, "scanned", planted)
    done = videogru("export", run, "--format", form, "--out", tmp_path / "wrong")
    assert done.code == 4
    assert "refused" in done.err and "Nothing was written" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_frozen_shapes_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = graph._traced_with
    monkeypatch.setattr(graph, "_traced_with", lambda *given: (honest(*given)[0], {}))
    done = videogru("export", run, "--format", "onnx", "--out", tmp_path / "frozen")
    assert done.code == 4
    assert "fresh process" in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_loses_accuracy_is_refused(run: Path) -> None:
    model, settings, corpus = open_run(run, dataset=None, data_dir=None)
    classifier, card = read_model(model)
    spoiled, _ = read_model(model)
    with torch.no_grad():
        spoiled.head.linear.weight.neg_()
        spoiled.head.linear.bias.neg_()
    ours, worse = (Predictor(one, card, device="cpu", data=settings.data) for one in (classifier, spoiled))
    reading = {"batch_size": 64, "num_workers": 0, "split": "val"}
    kept = gate.check_split(ours, ours, corpus, max_drop=0.0, precision="int8", **reading)
    assert kept["flips"] == 0 and kept["accuracy"] == kept["accuracy_of_pytorch"]
    with pytest.raises(GateRefused, match="falls by"):
        gate.check_split(ours, worse, corpus, max_drop=0.5, precision="int8", **reading)
    with pytest.raises(GateRefused, match="another class"):
        gate.check_split(ours, worse, corpus, max_drop=100.0, precision="fp32", **reading)
    assert gate.check_split(ours, worse, corpus, max_drop=100.0, precision="int8", **reading)["flips"] > 0


@pytest.mark.parametrize("words", [("--format", "pt2", "--precision", "int8"), ("--format", "tensorrt")])
def test_what_a_format_has_not(run: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = videogru("export", run, *words, "--out", tmp_path / "none")
    assert done.code == 2
    if "tensorrt" in words:
        assert "pip install tensorrt" in done.err
    else:
        assert "int8" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_its_install_line(
    run: Path, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else honest(name, *rest)
    )
    for done in (
        videogru("export", run, "--format", "onnx", "--out", tmp_path / "none"),
        videogru("eval", onnx_folder, "--out", tmp_path / "scores"),
    ):
        assert done.code == 2
        assert "pip install 'videogru[onnx]'" in done.err


def test_an_export_never_overwrites(run: Path, onnx_folder: Path) -> None:
    done = videogru("export", run, "--format", "onnx", "--out", onnx_folder)
    assert done.code == 2
    assert str(onnx_folder) in done.err


def test_damaged_folders(onnx_folder: Path, tmp_path: Path) -> None:
    card = json.loads((onnx_folder / "card.json").read_text())
    whole = (onnx_folder / "model.onnx").read_bytes()
    damages = {
        "short": lambda at: (at / "model.onnx").write_bytes(whole[: len(whole) // 2]),
        "flipped": lambda at: (at / "model.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
        "absent": lambda at: (at / "model.onnx").unlink(),
        "no json": lambda at: (at / "card.json").write_text("{"),
        "a list": lambda at: (at / "card.json").write_text("[1]"),
        "newer": lambda at: (at / "card.json").write_text(json.dumps(card | {"export_version": 99})),
        "less": lambda at: (at / "card.json").write_text(json.dumps({"export_version": 1})),
        "another file": lambda at: (at / "card.json").write_text(json.dumps(card | {"files": {"../x": ""}})),
        "no file": lambda at: ((at / "model.onnx").unlink(), os.mkfifo(at / "model.onnx")),
        "other card": lambda at: (at / "card.json").write_text(json.dumps(card | {"model_card": {"kind": "video"}})),
    }
    (tmp_path / "scan.nii.gz").touch()
    for name, damage in damages.items():
        folder = tmp_path / name
        shutil.copytree(onnx_folder, folder)
        damage(folder)
        done = videogru("infer", tmp_path / "scan.nii.gz", "--model", folder)
        assert done.code == 2, name
        assert str(folder) in done.err, name
        assert "Traceback" not in done.err, name


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["hyperplasia", "normal"]},
        {"step": True},
        {"step": "no"},
        {"precision": "fp99"},
        {"inputs": ["frame"]},
        {"outputs": ["logits"]},
        {"states": {"h": {}}},
        {"preprocessing": {"frame_shape": [1, 64, 64]}},
        {"preprocessing": {"frame_type": "uint8"}},
        {"preprocessing": {"normalization": {"mean": [0.9], "std": [0.1]}}},
        {"model_card": {"classes": ["x", "y"]}},
        {"model_card": {"frame_size": 64}},
    ],
)
def test_a_card_agrees_with_itself(onnx_folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    card = json.loads((onnx_folder / "card.json").read_text())
    for name, value in change.items():
        card[name] = {**card[name], **value} if isinstance(value, dict) else value
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelFileError, match="do not agree|damaged"):
        read_export_card(tmp_path)


def test_a_card_of_another_model(onnx_folder: Path, tmp_path: Path) -> None:
    """Card and file each agree with themselves: what the runtime refuses is an error of the folder."""
    shutil.copytree(onnx_folder, tmp_path / "made")
    card = json.loads((onnx_folder / "card.json").read_text())
    card["labels"] = card["model_card"]["classes"] = ["a", "b", "c"]
    card["golden"] = card["model_card"]["golden"] = None
    (tmp_path / "made" / "card.json").write_text(json.dumps(card))
    made, frames = open_exported(tmp_path / "made"), np.zeros((1, 3, 1, 28, 28), np.float32)
    with pytest.raises(ModelFileError, match="gives 2 probabilities, its card has 3 labels"):
        made.probabilities(frames, np.array([3]))
    with pytest.raises(ModelFileError, match="does not take what its card says"):
        made.probabilities(frames[..., :20], np.array([3]))


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, alive = tmp_path / f".made.{int(ended.stdout)}.partial", tmp_path / f".made.{os.getppid()}.partial"
    for folder in (dead, alive):
        folder.mkdir()
    with export.written_whole(tmp_path / "made") as folder:
        (folder / "x").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, "made"])


def test_the_folder_one_is_in_is_no_target(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = videogru("export", run, "--format", "onnx", "--out", ".")
    assert done.code == 2 and "the folder you are in" in done.err


def test_what_needs_pytorch_says_so(onnx_folder: Path, tmp_path: Path) -> None:
    import nibabel

    scan = tmp_path / "scan.nii.gz"
    draw = np.random.default_rng(0)
    nibabel.Nifti1Image(draw.integers(0, 255, (28, 28, 28)).astype(np.uint8), np.eye(4)).to_filename(scan)
    plain = videogru("infer", scan, "--model", onnx_folder, "--format", "jsonl")
    assert plain.code == 0, plain.err
    assert json.loads(plain.out)["predicted"] in {"normal", "hyperplasia"} | set(
        json.loads((onnx_folder / "card.json").read_text())["labels"]
    )
    explained = videogru("infer", scan, "--model", onnx_folder, "--explain", "--out", tmp_path / "x.jsonl")
    assert explained.code == 2
    assert "PyTorch" in explained.err
    again = videogru("export", onnx_folder, "--format", "onnx", "--out", tmp_path / "again")
    assert again.code == 2
    assert "PyTorch" in again.err


@pytest.mark.slow
def test_bench_measures_each_in_its_own_process(run: Path, onnx_folder: Path, tmp_path: Path) -> None:
    done = videogru(
        *("bench", run, onnx_folder, "--rounds", "2", "--batch-size", "2", "--split", "val", "--out", tmp_path)
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "bench.json").read_text())
    ours, theirs = found["entries"]
    assert ours["runs_on"] == "PyTorch, eager" and theirs["runs_on"] == "onnx fp32"
    assert ours["speedup"] == 1
    assert ours["accuracy"] == theirs["accuracy"]
    assert ours["bytes"] == (run / "model.safetensors").stat().st_size
    assert all(0 < one["latency_p50_ms"] <= one["latency_p95_ms"] for one in found["entries"])
    assert theirs["peak_mebibytes"] < ours["peak_mebibytes"]  # no torch in that process
    assert "onnx fp32" in (tmp_path / "bench.txt").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_frame_at_a_time_is_proven_too(tmp_path: Path, precision: str) -> None:
    trained = videogru(
        *("train", "--dataset", "adrenalmnist3d", "--epochs", "1", "--out", tmp_path / "run", "--batch-size", "64"),
        *("--set", "model.encoder_width=8", "--set", "model.hidden_size=8", "--set", "data.num_frames=8"),
        *("--set", "train.num_workers=0", "--set", "model.temporal=causal"),
    )
    assert trained.code == 0, trained.err
    words = ("--format", "onnx", "--step", "--precision", precision, "--max-drop", "3")
    folder = exported(tmp_path / "run", tmp_path / "step", *words)
    done = videogru("eval", folder, "--split", "val", "--out", tmp_path / "scores")
    assert done.code == 0, done.err
    said, wanted = (read_csv(at / "predictions-val.csv") for at in (tmp_path / "scores", tmp_path / "run"))
    np.testing.assert_allclose(said.probabilities, wanted.probabilities, atol=1e-5 if precision == "fp32" else 0.1)
    refused = videogru("export", tmp_path / "run", "--format", "tensorrt", "--step", "--out", tmp_path / "none")
    assert refused.code == 2
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32))
    ended = subprocess.run(
        [sys.executable, str(folder / "example.py"), str(tmp_path / "clip.npy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[0] in wanted.classes


def test_a_model_that_needs_frames_to_come_has_no_step(run: Path, tmp_path: Path) -> None:
    done = videogru("export", run, "--format", "onnx", "--step", "--out", tmp_path / "none")
    assert done.code == 2
    assert "temporal=bi" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["onnx", "int8"])
def test_the_example_needs_a_venv_with_the_runtime_and_numpy_alone(
    request: pytest.FixtureRequest, tmp_path: Path, which: str
) -> None:
    folder = request.getfixturevalue(f"{which}_folder")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (inside,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    outside = Path(np.__file__).parents[1]
    wanted = ["numpy", "numpy.libs", *{"onnx": ["onnxruntime"], "int8": ["openvino", "openvino.libs"]}[which]]
    # What these declare that they need, and the example does use.
    for name in (*wanted, "flatbuffers", "google", "packaging", "openvino_telemetry"):
        if (outside / name).exists():
            (inside / name).symlink_to(outside / name)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    bare = subprocess.run([str(python), "-c", "import torch"], env=environment, capture_output=True, check=False)
    assert bare.returncode == 1
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).random((6, 1, 28, 28), dtype=np.float32))
    ended = subprocess.run(
        [str(python), str(folder / "example.py"), str(tmp_path / "clip.npy")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[0] in json.loads((folder / "card.json").read_text())["labels"]
