"""Cells as scans against the cells they stand for."""

import pytest
import torch

from videogru.config import ModelConfig
from videogru.export.scan_cells import scanned
from videogru.models.classifier import Classifier


@pytest.mark.parametrize("cell", ["gru", "lstm", "mingru", "hypergru", "convgru"])
@pytest.mark.parametrize("temporal", ["bi", pytest.param("causal", marks=pytest.mark.slow)])
def test_a_scan_is_the_cell(cell: str, temporal: str) -> None:
    torch.manual_seed(0)
    model = Classifier(
        ModelConfig(
            encoder="pixels", encoder_width=4, cell=cell, temporal=temporal, hidden_size=5, hyper_size=3, num_layers=2
        ),
        in_channels=3,
        frame_size=4,
        num_classes=3,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales too
            parameter.add_(0.3 * torch.randn_like(parameter))
    written = scanned(model, torch_layers=True)
    kinds = {type(layer).__name__ for layer in written.recurrent.forward_layers}
    assert all(kind.startswith("Scanned") for kind in kinds)
    with torch.no_grad():
        for steps in (1, 2, 9):
            frames = torch.randint(0, 256, (3, steps, 3, 4, 4), dtype=torch.uint8)
            lengths = torch.tensor([steps, max(1, steps - 4), 1])
            torch.testing.assert_close(written(frames, lengths), model(frames, lengths), rtol=0, atol=2e-6)


def test_the_model_itself_stays_as_it_was() -> None:
    model = Classifier(
        ModelConfig(encoder="pixels", encoder_width=4, cell="mingru", hidden_size=5),
        in_channels=1,
        frame_size=4,
        num_classes=2,
        mean=(0.5,),
        std=(0.5,),
    )
    scanned(model, torch_layers=True)
    assert {type(layer).__name__ for layer in model.recurrent.forward_layers} == {"MinGRU"}
    assert model.training
