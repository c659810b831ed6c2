"""`videogru model verify` on every backend that is installed: a sound model passes, one planted fault fails alone."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from tests.support.command_line import videogru
from tests.support.small_models import written
from videogru.checkpoint.golden_sample import golden_batch
from videogru.checkpoint.model_file import read_model
from videogru.export import clip_graph as graph
from videogru.models.classifier import Normalize
from videogru.runtime.export_folder import file_sum
from videogru.workflows import export, verify

for _package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(_package)


@pytest.fixture(autouse=True)
def _sizes_stay_free() -> Iterator[None]:
    """See test_export: the tests' check of shapes would freeze sizes while a graph is traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model") / "model.safetensors", "volume", use_gaps=True)


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to ONNX in fp32, with what it says of the golden sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        return made(model, tmp_path_factory.mktemp("exported"), "fp32")


def made(model: Path, folder: Path, precision: str) -> Path:
    classifier, card = read_model(model)
    clips = [golden_batch(card)]
    built = export.build(folder, classifier, card, clips, format="onnx", precision=precision)
    export.write_card(replace(built, golden=export.golden_answer(folder, card)), card)
    return folder


@pytest.mark.slow
def test_one_fault_is_found_where_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of 0.45 in place of 0.4 in the program of torch.export alone."""
    honest = graph.to_pt2

    def planted(classifier, frame_type, path, *, half):
        wrong, _ = read_model(model)
        wrong.normalize = Normalize(tuple(value + 0.05 for value in classifier.mean), classifier.std)
        honest(wrong, frame_type, path, half=half)

    monkeypatch.setattr(graph, "to_pt2", planted)
    done = videogru("model", "verify", model)
    assert done.code == 4, done.err
    told = {line.removeprefix(f"{model}: ").split(" ")[0]: line for line in done.out.splitlines()}
    assert set(told) == {"torch", "onnx", "openvino", "pt2", "tensorrt"}
    for name in ("torch", "onnx", "openvino"):
        assert "): ok, logits differ by" in told[name]
    assert "): FAILED, logits differ by" in told["pt2"]
    if importlib.util.find_spec("tensorrt") is None:
        assert "not installed, pip install tensorrt" in told["tensorrt"]


def test_what_is_not_here_is_told_and_refused_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "model.safetensors", "video", cell="convgru")
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else honest(name, *rest)
    )
    done = videogru("model", "verify", path)
    assert done.code == 0, done.err
    assert "pt2 (torch" in done.out and "not supported, model.cell=convgru has no pt2" in done.out
    assert "not installed, pip install 'videogru[onnx]'" in done.out
    assert "not installed, pip install 'videogru[openvino]'" in done.out
    for name, reason in (("pt2", "convgru"), ("onnx", "pip install 'videogru[onnx]'"), ("onx", "onnx, openvino")):
        asked = videogru("model", "verify", path, "--backend", f"torch,{name}")
        assert asked.code == 2 and reason in asked.err


@pytest.mark.slow
def test_an_export_is_replayed_as_it_is(model: Path, folder: Path, tmp_path: Path) -> None:
    """Its answers, by hand: the softmax of what PyTorch says."""
    classifier, card = read_model(model)
    batch = golden_batch(card)
    with torch.no_grad():
        wanted = classifier(batch.frames, batch.lengths, batch.gaps).softmax(dim=-1)[0].numpy()
    stored = json.loads((folder / "card.json").read_text())
    np.testing.assert_allclose(stored["golden"]["probabilities"], wanted, atol=1e-5)
    sound = videogru("model", "verify", folder)
    assert sound.code == 0 and "onnx (fp32, onnxruntime" in sound.out and "): ok" in sound.out
    other = videogru("model", "verify", folder, "--backend", "torch")
    assert other.code == 2 and "--backend onnx" in other.err

    import onnx

    graph_ = onnx.load(folder / "model.onnx")
    (bias,) = (tensor for tensor in graph_.graph.initializer if tensor.name.endswith("head.linear.bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[1] += 0.05
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    shutil.copytree(folder, tmp_path / "planted")
    onnx.save(graph_, tmp_path / "planted" / "model.onnx")
    damaged = videogru("model", "verify", tmp_path / "planted")
    assert damaged.code == 4 and "not the bytes that were exported" in damaged.out
    stored["files"]["model.onnx"] = file_sum(tmp_path / "planted" / "model.onnx")
    (tmp_path / "planted" / "card.json").write_text(json.dumps(stored))
    planted = videogru("model", "verify", tmp_path / "planted")
    assert planted.code == 4 and "): FAILED, logits differ by 0.0" in planted.out


@pytest.mark.slow
def test_int8_is_compared_with_itself(model: Path, tmp_path: Path) -> None:
    folder = made(model, tmp_path, "int8")
    sound = videogru("model", "verify", folder)
    assert sound.code == 0 and "onnx (int8, " in sound.out and "probabilities differ by 0, allowed 0.05" in sound.out
    card = json.loads((folder / "card.json").read_text())
    card["golden"]["probabilities"] = card["golden"]["probabilities"][::-1]
    (folder / "card.json").write_text(json.dumps(card))
    assert videogru("model", "verify", folder).code == 4
    del card["golden"]  # as folders were before
    (folder / "card.json").write_text(json.dumps(card))
    before = videogru("model", "verify", folder)
    assert before.code == 4 and "no golden sample" in before.err


def test_more_threads_are_another_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    said = [verdict.runs_on.rsplit(", ")[-1] for verdict in verify.verify(model, ("torch",))]
    assert said == ["1 thread", "2 threads"]
    torch.set_num_threads(1)
