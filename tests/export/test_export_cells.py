"""Whole clips of any number and length, for every cell and format: the shape checks of `videogru export` themselves."""

from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from tests.support.small_models import stirred_classifier
from videogru.checkpoint.model_file import make_card
from videogru.config import DataConfig
from videogru.errors import ConfigError
from videogru.export.acceptance import cases_of, check_shapes
from videogru.sequence import SequenceBatch
from videogru.workflows import export

for _package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(_package)

SIDE, STEPS = 16, 6


@pytest.fixture(autouse=True)
def _sizes_stay_free() -> Iterator[None]:
    """See test_export: the tests' check of shapes would freeze sizes while a graph is traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def checked(tmp_path: Path, form: str, precision: str, **settings: object) -> tuple[float, ...]:
    chosen = {"encoder": "small", "encoder_width": 8, "hidden_size": 8, "hyper_size": 4} | settings
    model = stirred_classifier(SIDE, **chosen)
    coarse = np.random.default_rng(0).integers(0, 256, (4, STEPS, 3, 4, 4), dtype=np.uint8)
    frames = torch.from_numpy(np.kron(coarse, np.ones((1, 1, 1, SIDE // 4, SIDE // 4), np.uint8)))
    gaps = torch.ones(4, STEPS)
    gaps[:, 0] = 0
    clips = [SequenceBatch(frames, torch.full((4,), STEPS), torch.arange(4), gaps=gaps)]
    data = DataConfig(frame_size=SIDE, num_frames=STEPS).for_kind("video")
    card = make_card(model, kind="video", classes=("a", "b", "c", "d"), data=data)
    export.check_wanted(model, format=form, precision=precision, step=False)
    (tmp_path / "made").mkdir()
    export.build(tmp_path / "made", model, card, clips, format=form, precision=precision)
    return check_shapes(tmp_path / "made", model, cases_of(clips, model.config.use_gaps), precision)


@pytest.mark.parametrize(
    ("form", "precision", "settings"),
    [
        pytest.param("openvino", "int8", {"cell": "lstm", "pooling": "attention"}, marks=pytest.mark.slow),
        ("onnx", "fp32", {"temporal": "causal", "num_layers": 2, "lookahead": 2}),
        pytest.param("onnx", "int8", {"cell": "mingru", "seq": "rows", "use_gaps": True}, marks=pytest.mark.slow),
        pytest.param("onnx", "int8", {"temporal": "causal", "cell": "lstm", "num_layers": 2}, marks=pytest.mark.slow),
    ],
)
def test_shapes_and_padding(tmp_path: Path, form: str, precision: str, settings: dict[str, object]) -> None:
    largest, mean, padding = checked(tmp_path, form, precision, **settings)
    assert largest <= (1e-5 if precision == "fp32" else 0.05)
    assert mean <= largest
    assert padding <= (1e-5 if precision == "fp32" else 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino", "pt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "gru", "num_layers": 2, "residual": True},
        {"temporal": "causal", "num_layers": 2, "pooling": "last"},
        {"cell": "lstm"},
        {"cell": "mingru"},
        {"cell": "hypergru"},
        {"cell": "convgru"},
        {"cell": "none", "pooling": "multihead"},
        {"encoder": "sweeps", "encoder_width": 4, "seq": "grid"},
        {"encoder": "mobilenet_v3_small", "frame_differences": "both"},
        {"local_attention": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_cell_in_every_format(tmp_path: Path, form: str, settings: dict[str, object]) -> None:
    if form == "pt2" and settings.get("cell") == "convgru":
        with pytest.raises(ConfigError, match="no pt2"):
            checked(tmp_path, form, "fp32", **settings)
        return
    assert max(checked(tmp_path, form, "fp32", **settings)) < 1e-4


def test_what_has_no_int8(tmp_path: Path) -> None:
    for cell in ("hypergru", "convgru"):
        with pytest.raises(ConfigError, match="no int8"):
            checked(tmp_path, "onnx", "int8", cell=cell)
