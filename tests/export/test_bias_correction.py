"""Biases of quantized convolutions: their channels keep the means that they had."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

from videogru.export import clip_graph as graph
from videogru.export import quantize
from videogru.export.bias_correction import channel_means


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kinds = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()]
        self.layers = nn.Sequential(*kinds, nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layers(frames)
        return outputs


def test_means_are_kept_where_most_of_a_frame_is_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    frames = np.full((6, 1, 16, 16), 0.1234, np.float32)
    frames[:, :, 5:8, 5:8] = np.random.default_rng(0).random((6, 1, 3, 3), dtype=np.float32) * 3
    feeds = [{"frames": frames[[k]]} for k in range(6)]
    free = {"frames": {0: torch.export.Dim.DYNAMIC}}
    made = [graph.onnx_of(_Net().eval(), (torch.zeros(2, 1, 16, 16),), free, ("frames",), ("maps",))]
    made.append(type(made[0]).FromString(made[0].SerializeToString()))
    original = type(made[0]).FromString(made[0].SerializeToString())
    corrected = quantize.to_int8(made[0], feeds)
    monkeypatch.setattr(quantize, "correct_biases", lambda *given: None)
    plain = quantize.to_int8(made[1], feeds)
    wanted = channel_means(original, ["maps"], feeds)["maps"]
    shifts = [np.abs(channel_means(one, ["maps"], feeds)["maps"] - wanted).max() for one in (corrected, plain)]
    assert shifts[0] < shifts[1] / 3
    with torch.no_grad():
        exact = torch.from_numpy(frames)
        torch.manual_seed(0)
        np.testing.assert_allclose(wanted, _Net()(exact).mean(dim=(0, 2, 3)).numpy(), atol=1e-6)
