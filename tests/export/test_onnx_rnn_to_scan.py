"""GRU and LSTM nodes written out with an int8 recurrent product, against numpy and torch."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

pytest.importorskip("onnxruntime")

import onnxruntime

from videogru.export import clip_graph as graph
from videogru.export.onnx_rnn_to_scan import quantize_rows, scan_form

D, H = 5, 7


class _OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(steps)[0]
        return outputs


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def restated(layer: nn.GRU | nn.LSTM, steps: NDArray[np.float32], suffix: str = "") -> NDArray[np.float64]:
    """States (B S H) of torch's equations, in float64, but for the recurrent product: 8 bits times 8 bits.

    Gates as torch keeps them: GRU r, z, n; LSTM i, f, g, o.
    """
    named = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    w, u, b, c = (named[f"{name}_l0{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    scales = np.abs(u).max(axis=1, keepdims=True) / 127
    rounded = np.round(u / scales) * scales
    h = np.zeros((len(steps), H))
    memory = np.zeros_like(h)
    states = []
    for x in steps.transpose(1, 0, 2).astype(np.float64):
        from_state = np.round(h * 127) / 127 @ rounded.T + c
        from_input = x @ w.T + b
        if isinstance(layer, nn.GRU):
            (xr, xz, xn), (hr, hz, hn) = np.split(from_input, 3, axis=1), np.split(from_state, 3, axis=1)
            r, z = _sigmoid(xr + hr), _sigmoid(xz + hz)
            h = (1 - z) * np.tanh(xn + r * hn) + z * h
        else:
            i, f, g, o = np.split(from_input + from_state, 4, axis=1)
            memory = _sigmoid(f) * memory + _sigmoid(i) * np.tanh(g)
            h = _sigmoid(o) * np.tanh(memory)
        states.append(h)
    return np.stack(states, axis=1)


@pytest.mark.parametrize(
    ("kind", "bidirectional"), [pytest.param(nn.GRU, False, marks=pytest.mark.slow), (nn.LSTM, False), (nn.GRU, True)]
)
def test_the_int8_layer_is_its_restatement(kind: type, bidirectional: bool) -> None:
    torch.manual_seed(0)
    layer = kind(D, H, batch_first=True, bidirectional=bidirectional).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = graph.onnx_of(_OneLayer(layer), (torch.zeros(2, 5, D),), {"steps": free}, ("steps",), ("states",))
    written = scan_form(model)
    assert not {node.op_type for node in written.graph.node} & {"GRU", "LSTM", "Loop"}
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # as `exported.run` has it
    session = onnxruntime.InferenceSession(written.SerializeToString(), options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    for clips, length in ((1, 1), (3, 9)):
        steps = draw.normal(size=(clips, length, D)).astype(np.float32)
        (said,) = session.run(None, {"steps": steps})
        wanted = restated(layer, steps)
        if bidirectional:
            backward = restated(layer, steps[:, ::-1], "_reverse")[:, ::-1]
            wanted = np.concatenate([wanted, backward], axis=2)
        # A state on the edge of two integers may round the other way in float32; then 1/127 of a weight differs.
        assert np.abs(said - wanted).max() < 1e-5 or np.mean(np.abs(said - wanted) > 1e-5) < 0.1
        with torch.no_grad():
            exact = layer(torch.from_numpy(steps))[0].numpy()
        assert np.abs(said - exact).max() < 0.03
        assert length == 1 or np.abs(said - exact).max() > 1e-5  # it is rounded indeed


def test_rows_are_rounded_each_with_its_own_scale() -> None:
    matrix = np.array([[1.27, -0.64, 0.0], [0.0127, 0.0001, -0.0127], [0, 0, 0]], np.float32)
    values, scales = quantize_rows(matrix)
    assert values.tolist() == [[127, -64, 0], [127, 1, -127], [0, 0, 0]]
    np.testing.assert_allclose(scales, [0.01, 0.0001, 1], rtol=1e-6)
