from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from videogru.checkpoint.model_file import make_card, write_model
from videogru.config import DataConfig, ModelConfig
from videogru.errors import ConfigError
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Classifier


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    classifier = Classifier(
        ModelConfig(encoder="pixels", encoder_width=4, seq="rows", hidden_size=6),
        in_channels=3,
        frame_size=8,
        num_classes=3,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    data = DataConfig(frame_size=8).for_kind("image")
    write_model(
        tmp_path / "model.safetensors",
        classifier,
        make_card(classifier, kind="image", classes=("a", "b", "c"), data=data),
    )
    return tmp_path / "model.safetensors"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_probabilities_are_the_softmax_of_the_classifier(model: Path, pictures: list[Path]) -> None:
    predictor = Predictor.from_file(model, device="cpu")
    said = predictor.predict_paths(pictures)
    frames = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in pictures])).permute(0, 3, 1, 2)[
        :, None
    ]
    with torch.inference_mode():
        wanted = predictor.classifier(frames, torch.ones(20, dtype=torch.int64)).softmax(dim=1)
    np.testing.assert_allclose(said.probabilities, wanted.numpy(), atol=1e-6)
    assert said.classes == ("a", "b", "c")
    assert said.labels.tolist() == [-1] * 20


@pytest.mark.parametrize("workers", [0, 2])
def test_order_errors_and_ticks(model: Path, pictures: list[Path], workers: int) -> None:
    pictures[3].write_bytes(b"")
    pictures[11].unlink()
    ticks: list[int] = []
    said = Predictor.from_file(model).predict_paths(pictures, num_workers=workers, tick=ticks.append)
    assert sum(ticks) == 20
    assert [str(source) for source in said.sources] == [str(path) for path in pictures]
    assert np.flatnonzero(said.failed).tolist() == [3, 11]
    assert said.predicted[3] == -1
    alone = Predictor.from_file(model).predict_paths([pictures[5]])
    np.testing.assert_allclose(alone.probabilities[0], said.probabilities[5], atol=1e-5)


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there(model: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        Predictor.from_file(model, device=device)
