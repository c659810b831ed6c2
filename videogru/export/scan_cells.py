"""Recurrent cells as one scan over the steps, for graphs whose number of steps is free.

The cells of `models` loop in Python or by doubling, and a graph would keep the number of steps it was traced with.
A scan (torch's higher-order operation) stays one node, whose body is one step; ONNX has the same as Scan. Nothing in a
body may be wrapped, as by the tests' check of shapes: no_type_check keeps it as it is.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from videogru.models.cells.cells import HyperGRU, MinGRU
from videogru.models.cells.conv_gru import ConvGRU
from videogru.models.classifier import Classifier

Cell = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


def over_steps(cell: Cell, starts: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """First states after each step (B S ...), and the last states, of `cell(states, inputs at a step) -> states`."""

    @no_type_check
    def body(states: tuple[Tensor, ...], at_step: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        after = cell(states, at_step)
        return after, after[0].clone()  # a scan's carry and output must not be one tensor

    last, outputs = scan(body, starts, tuple(values.transpose(0, 1) for values in inputs))
    return outputs.transpose(0, 1), tuple(last)


class ScannedMinGRU(nn.Module):
    """What `MinGRU` computes, step by step."""

    def __init__(self, cell: MinGRU) -> None:
        super().__init__()
        self.project, self.hidden_size = cell.project, cell.hidden_size

    def forward(
        self, inputs: Float[Tensor, "B S D"], state: Float[Tensor, "1 B H"] | None = None
    ) -> tuple[Float[Tensor, "B S H"], Float[Tensor, "1 B H"]]:
        """States after each step, and the last."""
        update, candidate = self.project(inputs).chunk(2, dim=-1)
        start = inputs.new_zeros(inputs.shape[0], self.hidden_size) if state is None else state[0]

        @no_type_check
        def cell(states: tuple[Tensor, ...], at_step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            decay, added = at_step
            return (added + decay * states[0],)

        given = (torch.sigmoid(-update), torch.sigmoid(update) * candidate)
        outputs, (last,) = over_steps(cell, (start,), given)
        return outputs, last.unsqueeze(0)


class ScannedHyperGRU(nn.Module):
    """What `HyperGRU` computes: the weights that it makes of its parameters are made once."""

    w: Tensor
    offset: Tensor

    def __init__(self, cell: HyperGRU) -> None:
        super().__init__()
        self.hidden_size, self.hyper_size = cell.hidden_size, cell.hyper.hidden_size
        main, hyper, D = cell.main, cell.hyper, cell.input_size
        with torch.no_grad():
            modulate, constants = cell._modulation()
            made = {
                "w": torch.cat((main.weight_ih, hyper.weight_ih[:, :D])),
                "offset": torch.cat((torch.zeros_like(main.bias_ih), hyper.bias_ih)),
                "u": torch.cat((main.weight_hh, hyper.weight_ih[:, D:])).t().contiguous(),
                "u_hyper": hyper.weight_hh.t().contiguous(),
                "bias": main.bias_hh.clone(),
                "bias_hyper": hyper.bias_hh.clone(),
                "modulate": modulate.contiguous(),
                "constants": constants,
            }
        for name, tensor in made.items():
            self.register_buffer(name, tensor.detach())

    def forward(
        self, inputs: Float[Tensor, "B S D"], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B S H"], tuple[Float[Tensor, "1 B H"], Float[Tensor, "1 B N"]]]:
        """States after each step, and the last of both GRUs."""
        H, N, B = self.hidden_size, self.hyper_size, inputs.shape[0]
        zeros = (inputs.new_zeros(B, H), inputs.new_zeros(B, N))
        starts = zeros if state is None else (state[0][0], state[1][0])

        @no_type_check
        def cell(states: tuple[Tensor, ...], at_step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, g = states
            x, x_hyper = at_step[0].split((3 * H, 3 * N), dim=1)
            y, y_hyper = (h @ self.u).split((3 * H, 3 * N), dim=1)
            g = _gru_step(x_hyper + y_hyper, g @ self.u_hyper + self.bias_hyper, g)
            scale_x, scale_y, shift = (g @ self.modulate + self.constants).chunk(3, dim=1)
            h = _gru_step(shift + scale_x * x, self.bias + scale_y * y, h)
            return h, g

        outputs, (h, g) = over_steps(cell, starts, (F.linear(inputs, self.w, self.offset),))
        return outputs, (h.unsqueeze(0), g.unsqueeze(0))


class ScannedConvGRU(nn.Module):
    """What `ConvGRU` computes."""

    def __init__(self, cell: ConvGRU) -> None:
        super().__init__()
        self.hidden_size = cell.hidden_size
        self.from_input, self.to_gates, self.to_new = cell.from_input, cell.to_gates, cell.to_new

    def forward(
        self, maps: Float[Tensor, "B T D h w"], state: Float[Tensor, "1 B H h w"] | None = None
    ) -> tuple[Float[Tensor, "B T H h w"], Float[Tensor, "1 B H h w"]]:
        """States after each step, and the last."""
        B, T, _, h, w = maps.shape
        H = self.hidden_size
        from_inputs = self.from_input(maps.flatten(0, 1)).unflatten(0, (B, T))
        start = maps.new_zeros(B, H, h, w) if state is None else state[0]

        @no_type_check
        def cell(states: tuple[Tensor, ...], at_step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden,) = states
            gates, new = at_step[0].split((2 * H, H), dim=1)
            update, reset = torch.sigmoid(gates + self.to_gates(hidden)).chunk(2, dim=1)
            new = torch.tanh(new + self.to_new(reset * hidden))
            return (hidden + update * (new - hidden),)

        outputs, (last,) = over_steps(cell, (start,), (from_inputs,))
        return outputs, last.unsqueeze(0)


class ScannedGRU(nn.Module):
    """What torch's GRU computes, one layer, one direction, batch_first."""

    w: Tensor
    u: Tensor
    b: Tensor
    c: Tensor

    def __init__(self, layer: nn.GRU) -> None:
        super().__init__()
        self.hidden_size = layer.hidden_size
        self.w, self.u, self.b, self.c = layer._parameters.values()  # type: ignore[assignment]

    def forward(
        self, inputs: Float[Tensor, "B S D"], state: Float[Tensor, "1 B H"] | None = None
    ) -> tuple[Float[Tensor, "B S H"], Float[Tensor, "1 B H"]]:
        """States after each step, and the last."""
        start = inputs.new_zeros(inputs.shape[0], self.hidden_size) if state is None else state[0]

        @no_type_check
        def cell(states: tuple[Tensor, ...], at_step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_gru_step(at_step[0], F.linear(states[0], self.u, self.c), states[0]),)

        outputs, (last,) = over_steps(cell, (start,), (F.linear(inputs, self.w, self.b),))
        return outputs, last.unsqueeze(0)


class ScannedLSTM(nn.Module):
    """What torch's LSTM computes, one layer, one direction, batch_first."""

    w: Tensor
    u: Tensor
    b: Tensor
    c: Tensor

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.hidden_size = layer.hidden_size
        self.w, self.u, self.b, self.c = layer._parameters.values()  # type: ignore[assignment]

    def forward(
        self, inputs: Float[Tensor, "B S D"], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B S H"], tuple[Float[Tensor, "1 B H"], Float[Tensor, "1 B H"]]]:
        """Hidden states after each step, and the last hidden and cell states."""
        if state is None:
            zeros = inputs.new_zeros(inputs.shape[0], self.hidden_size)
            starts = (zeros, zeros.clone())
        else:
            starts = (state[0][0], state[1][0])

        @no_type_check
        def cell(states: tuple[Tensor, ...], at_step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, memory = states
            i, f, g, o = (at_step[0] + F.linear(hidden, self.u, self.c)).chunk(4, dim=1)
            memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(memory), memory

        outputs, (hidden, memory) = over_steps(cell, starts, (F.linear(inputs, self.w, self.b),))
        return outputs, (hidden.unsqueeze(0), memory.unsqueeze(0))


class LengthKept(nn.Module):
    """A layer of torch whose outputs have as many steps as its inputs, as a graph sees it.

    The exporter to ONNX gives outputs of torch's GRU and LSTM the number of steps they were traced with, and what comes
    next, a second layer above all, would freeze it. Backward states are reordered, which has the same effect.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """As the layer."""
        outputs, last = self.layer(inputs)
        every = torch.arange(inputs.shape[1], device=inputs.device)
        return outputs.index_select(1, every), last


@no_type_check
def _gru_step(
    from_input: Float[Tensor, "B G"], from_state: Float[Tensor, "B G"], state: Float[Tensor, "B H"]
) -> Float[Tensor, "B H"]:
    reset_input, update_input, new_input = from_input.chunk(3, dim=1)
    reset_state, update_state, new_state = from_state.chunk(3, dim=1)
    reset, update = torch.sigmoid(reset_input + reset_state), torch.sigmoid(update_input + update_state)
    new = torch.tanh(new_input + reset * new_state)
    return new + update * (state - new)


_LOOPS: dict[type[nn.Module], type[nn.Module]] = {
    MinGRU: ScannedMinGRU,
    HyperGRU: ScannedHyperGRU,
    ConvGRU: ScannedConvGRU,
}
_TORCH: dict[type[nn.Module], type[nn.Module]] = {nn.GRU: ScannedGRU, nn.LSTM: ScannedLSTM}


def scanned(classifier: Classifier, *, torch_layers: bool) -> Classifier:
    """A copy whose cells are scans; torch_layers: also torch's own, where the graph has no node for these."""
    copy = deepcopy(classifier).eval()
    kinds = _LOOPS | (_TORCH if torch_layers else {})
    for layers in (copy.recurrent.forward_layers, copy.recurrent.backward_layers):
        for index, layer in enumerate(layers):
            if type(layer) in kinds:
                layers[index] = kinds[type(layer)](layer)
            elif type(layer) in _TORCH and not copy.recurrent.bidirectional:
                layers[index] = LengthKept(layer)
    return copy
