"""The graph of one frame of a stream: the same answers as whole clips, for every kind of state."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from tests.support.small_models import stirred_classifier
from tests.support.stream_sources import write_stream_model
from videogru.checkpoint.model_file import make_card, read_model
from videogru.config import DataConfig, ModelConfig
from videogru.data.readers.stream import open_stream
from videogru.errors import ConfigError
from videogru.export.example_script import example_for
from videogru.export.subprocess_run import replay
from videogru.inference.predictor import Predictor
from videogru.inference.stream import Progress, StreamClassifier, follow
from videogru.models.classifier import Classifier
from videogru.runtime.backends import open_exported
from videogru.runtime.export_folder import EXAMPLE_NAME, read_export_card
from videogru.sequence import SequenceBatch
from videogru.workflows import export
from videogru.workflows.stream import check_calibrated

for _package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(_package)

SIDE, STEPS = 16, 6


@pytest.fixture(autouse=True)
def _sizes_stay_free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """See test_export: the tests' check of shapes would freeze sizes while a graph is traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def a_model(**settings: object) -> Classifier:
    return stirred_classifier(SIDE, encoder="small", encoder_width=8, hidden_size=8, temporal="causal", **settings)


def clips() -> SequenceBatch:
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (4, STEPS, 3, 4, 4), dtype=np.uint8)
    frames = torch.from_numpy(np.kron(coarse, np.ones((1, 1, 1, SIDE // 4, SIDE // 4), np.uint8)))
    lengths = torch.tensor([STEPS, 4, 1, 3])
    gaps = torch.ones(4, STEPS)
    gaps[:, 0] = 0
    return SequenceBatch(frames, lengths, torch.arange(4), gaps=gaps)


def made(model: Classifier, folder: Path, form: str, precision: str) -> Path:
    folder.mkdir()
    data = DataConfig(frame_size=SIDE, num_frames=STEPS).for_kind("video")
    card = make_card(model, kind="video", classes=("a", "b", "c", "d"), data=data)
    export.build(folder, model, card, [clips()], format=form, precision=precision, step=True)
    return folder


def wanted(model: Classifier) -> np.ndarray:
    batch = clips()
    gaps = batch.gaps if model.config.use_gaps else None
    with torch.inference_mode():
        return model(batch.frames, batch.lengths, gaps).softmax(dim=1).numpy()


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        pytest.param("onnx", {"cell": "gru", "num_layers": 2}, marks=pytest.mark.slow),
        pytest.param("openvino", {"cell": "lstm", "pooling": "attention"}, marks=pytest.mark.slow),
        ("pt2", {"cell": "mingru", "pooling": "max"}),
        pytest.param(
            *("onnx", {"cell": "gru", "use_gaps": True, "frame_differences": "past", "pooling": "last"}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_frame_by_frame_is_the_whole_clip(tmp_path: Path, form: str, settings: dict[str, object]) -> None:
    model, batch = a_model(**settings), clips()
    exported = open_exported(made(model, tmp_path / "made", form, "fp32"))
    said = exported.probabilities(batch.frames.numpy(), batch.lengths.numpy(), batch.gaps.numpy())
    np.testing.assert_allclose(said, wanted(model), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_streams_in_a_batch_and_states_by_name(tmp_path: Path) -> None:
    model, batch = a_model(), clips()
    exported = open_exported(made(model, tmp_path / "made", "onnx", "fp32"))
    states = exported.fresh_states(4)
    assert {name: list(array.shape) for name, array in states.items()} == {
        name: [4, *tensor.shape[1:]] for name, tensor in model.initial_state(1).items()
    }
    torch_state = model.initial_state(4)
    for step in range(3):
        said = exported.step({"frame": batch.frames[:, step].numpy(), **states})
        states = {name: said[f"{name}.next"] for name in states}
        logits, torch_state = model.step(batch.frames[:, step], torch_state)
        np.testing.assert_allclose(said["probabilities"], logits.softmax(dim=1).numpy(), rtol=0, atol=2e-5)
        for name, tensor in torch_state.items():
            np.testing.assert_allclose(states[name], tensor.numpy(), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "cell"), [("onnx", "gru"), ("openvino", "lstm")])
def test_int8_in_a_fresh_process(tmp_path: Path, form: str, cell: str) -> None:
    model, batch = a_model(cell=cell), clips()
    folder = made(model, tmp_path / "made", form, "int8")
    assert json.loads((folder / "card.json").read_text())["step"] is True
    (said,) = replay(folder, [{"frames": batch.frames.numpy(), "lengths": batch.lengths.numpy()}])
    difference = np.abs(said["probabilities"] - wanted(model))
    assert 1e-6 < difference.max() < 0.05


def test_a_model_that_reads_ahead_has_no_step(tmp_path: Path) -> None:
    model = Classifier(
        ModelConfig(encoder="pixels", encoder_width=4, hidden_size=4),
        in_channels=1,
        frame_size=4,
        num_classes=2,
        mean=(0.5,),
        std=(0.5,),
    )
    with pytest.raises(ConfigError, match="temporal=bi"):
        export.check_wanted(model, format="onnx", precision="fp32", step=True)


@pytest.mark.parametrize("form", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_stream_runs_on_the_graph_of_a_step(shared_data: Path, tmp_path: Path, form: str) -> None:
    path = write_stream_model(tmp_path / "model.safetensors", use_gaps=True, num_layers=2, data={"sampling": "dense"})
    classifier, card = read_model(path)
    folder = tmp_path / form
    folder.mkdir()
    export.build(folder, classifier, card, [], format=form, precision="fp32", step=True)
    video = sorted((shared_data / "grid/videos").glob("*.mp4"))[1]
    answers = []
    for model in (path, folder):
        predictor = Predictor.from_file(model, device="cpu")
        stream = open_stream(str(video), data=predictor.data)
        following = StreamClassifier(predictor, restart_seconds=1.5)
        said = list(follow(stream, following, step_seconds=0.1, progress=Progress()))
        stream.close()
        answers.append(np.stack([probabilities for _, probabilities in said]))
    check_calibrated(folder)
    np.testing.assert_allclose(answers[1], answers[0], rtol=0, atol=1e-5)
    assert answers[0].shape == (30, 3) and np.ptp(answers[0], axis=0).max() > 0.01
    card = folder / "card.json"
    card.write_text(card.read_text().replace('"precision": "fp32"', '"precision": "int8"'))
    with pytest.raises(ConfigError, match="calibrated in float32, and this export computes in int8"):
        check_calibrated(folder)


@pytest.mark.slow
def test_an_export_of_whole_clips_follows_no_stream(tmp_path: Path) -> None:
    classifier, card = read_model(write_stream_model(tmp_path / "model.safetensors"))
    folder = tmp_path / "whole"
    folder.mkdir()
    export.build(folder, classifier, card, [], format="onnx", precision="fp32")
    with pytest.raises(ConfigError, match="(?s)takes whole clips.*--step"):
        StreamClassifier(Predictor.from_file(folder, device="cpu"))


def test_the_example_of_a_step_reads_gaps(tmp_path: Path) -> None:
    model, batch = a_model(use_gaps=True), clips()
    folder = made(model, tmp_path / "made", "onnx", "fp32")
    (folder / EXAMPLE_NAME).write_text(example_for(read_export_card(folder)))
    np.save(tmp_path / "frames.npy", batch.frames[0].numpy())
    np.save(tmp_path / "gaps.npy", batch.gaps[0].numpy())
    command = [sys.executable, str(folder / EXAMPLE_NAME), str(tmp_path / "frames.npy")]
    ended = subprocess.run([*command, str(tmp_path / "gaps.npy")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    best = wanted(model)[0]
    assert ended.stdout == f"{'abcd'[best.argmax()]} {best.max():.3f}\n"
    short = subprocess.run(command, capture_output=True, text=True, check=False)
    assert short.returncode == 1 and "FRAMES.npy GAPS.npy" in short.stderr and "Traceback" not in short.stderr
