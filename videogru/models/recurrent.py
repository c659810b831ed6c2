"""The part that reads the steps in order: recurrent layers over padded clips, exact without packing.

A bidirectional layer is two unidirectional ones; the second reads each clip's valid steps reversed by a gather. That
equals `pack_padded_sequence` (a test compares them), and unlike packing it exports with a free batch size and compiles.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from videogru.config import ModelConfig
from videogru.models.cells.cells import HyperGRU, MinGRU, init_gates
from videogru.models.checkpointing import in_chunks
from videogru.models.serialize import valid_steps
from videogru.models.streaming import Slot, State, of_part, prefixed
from videogru.shapes import Lengths, Steps


class Recurrent(nn.Module):
    """Steps (B S D), of which the first `lengths` (B,) are valid, to (B S F), F = `out_size`; zeros at padded steps.

    F is hidden_size, twice that where `temporal` is bi: forward states, then backward states. Cell `none` hands the
    steps on as they are (F = D): the order-free twin. `residual` adds what a layer reads, before dropout, to what it
    gives, through a projection where the widths differ (He et al. 2016, arXiv:1512.03385, section 3.2). Runs in float32
    at least, also under autocast: bfloat16 would save a fifth of this part's time, little of a whole step, and rounds
    at every state update. checkpoint_steps: in training that many steps are recomputed at a time on the way back; 0:
    none are.
    """

    def __init__(self, config: ModelConfig, input_size: int) -> None:
        super().__init__()
        self.bidirectional = config.cell != "none" and config.temporal == "bi"
        self.forward_layers = nn.ModuleList()
        self.backward_layers = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
        self.checkpoint_steps = 0
        size = input_size
        if config.cell != "none":
            for _ in range(config.num_layers):
                self.forward_layers.append(self.layer_of(config, size))
                if self.bidirectional:
                    self.backward_layers.append(self.layer_of(config, size))
                width = config.hidden_size * (2 if self.bidirectional else 1)
                if config.residual:
                    self.shortcuts.append(self.shortcut_of(size, width))
                size = width
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.norm: nn.Module = nn.LayerNorm(size) if config.layer_norm else nn.Identity()
        self.out_size = size

    @staticmethod
    def layer_of(config: ModelConfig, input_size: int) -> nn.Module:
        """One layer, one direction."""
        return _layer(config, input_size)

    @staticmethod
    def shortcut_of(input_size: int, output_size: int) -> nn.Module:
        """What brings a layer's input to its output's width, for `residual`."""
        if input_size == output_size:
            return nn.Identity()
        linear = nn.Linear(input_size, output_size, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        return linear

    def forward(self, steps: Steps, lengths: Lengths) -> Float[Tensor, "B S F"]:
        """States after each step, in the order of the steps."""
        with torch.autocast(steps.device.type, enabled=False):
            if steps.dtype in (torch.bfloat16, torch.float16):
                steps = steps.float()
            padded = ~valid_steps(lengths, steps.shape[1]).unsqueeze(-1)
            states = steps.masked_fill(padded, 0.0)  # whatever padding holds, nan too, stops here
            order = reversed_order(lengths, steps.shape[1]) if self.bidirectional else None
            for index, ahead in enumerate(self.forward_layers):
                inputs = self.input_dropout(states)
                outputs = self._read(ahead, inputs)
                if order is not None:
                    back = self._read(self.backward_layers[index], _reorder(inputs, order))
                    outputs = torch.cat((outputs, _reorder(back, order)), dim=-1)
                states = outputs + self.shortcuts[index](states) if len(self.shortcuts) else outputs
            normed: Tensor = self.norm(states)
            return normed.masked_fill(padded, 0.0)

    def slots(self, cells: tuple[int, ...] = ()) -> dict[str, Slot]:
        """What a stream keeps: the state of each layer; cells: (h, w) of maps, for layers that read these."""
        return {
            f"{index}.{name}": Slot((size, *cells))
            for index, layer in enumerate(self.forward_layers)
            for name, size in _state_sizes(layer).items()
        }

    def step(self, steps: Steps, state: State) -> tuple[Float[Tensor, "B N F"], State]:
        """States after each of N more steps (B N D), and what to keep; only where it is not bidirectional."""
        with torch.autocast(steps.device.type, enabled=False):
            states, kept = steps.float() if steps.dtype in (torch.bfloat16, torch.float16) else steps, State()
            for index in range(len(self.forward_layers)):
                outputs, after = self._go_on(index, states, of_part(str(index), state))
                kept |= prefixed(str(index), after)
                states = outputs + self.shortcuts[index](states) if len(self.shortcuts) else outputs
            normed: Tensor = self.norm(states)
            return normed, kept

    def _go_on(self, index: int, steps: Float[Tensor, "B N *D"], state: State) -> tuple[Float[Tensor, "B N *H"], State]:
        """A layer's outputs from `state` on, and its state after them; torch's layers have an axis of layers first."""
        layer = self.forward_layers[index]
        names = list(_state_sizes(layer))  # a state from a file may be in another order
        given = [state[name].contiguous().unsqueeze(0) for name in names]
        outputs, after = layer(steps, given[0] if len(given) == 1 else tuple(given))
        tensors = (after,) if len(given) == 1 else after
        return outputs, {name: tensor.squeeze(0) for name, tensor in zip(names, tensors, strict=True)}

    def _read(self, layer: nn.Module, steps: Float[Tensor, "B S *D"]) -> Float[Tensor, "B S *H"]:
        if self.checkpoint_steps and self.training and torch.is_grad_enabled():
            return in_chunks(layer, steps, self.checkpoint_steps)
        states: Tensor = layer(steps)[0]
        return states


def _state_sizes(layer: Any) -> dict[str, int]:
    """Names of the tensors of a layer's state, in the layer's order, and how many features each has."""
    sizes: dict[str, int] = {"hidden": layer.hidden_size}
    if isinstance(layer, nn.LSTM):
        sizes["cell"] = layer.hidden_size
    elif isinstance(layer, HyperGRU):
        sizes["hyper"] = layer.hyper.hidden_size
    return sizes


def reversed_order(lengths: Lengths, total: int) -> Int64[Tensor, "B S"]:
    """For each clip length-1, ..., 0, then the padded steps in place; it is its own inverse."""
    places = torch.arange(total, device=lengths.device)
    mirrored = lengths.unsqueeze(1) - 1 - places
    return torch.where(mirrored >= 0, mirrored, places)


def _reorder(steps: Float[Tensor, "B S D"], order: Int64[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    return steps.gather(1, order.unsqueeze(-1).expand(-1, -1, steps.shape[-1]))


def _layer(config: ModelConfig, input_size: int) -> nn.Module:
    """One layer, one direction; each gate's blocks Xavier-uniform, biases zero, as in the article.

    But the forget gate's bias of an LSTM is one (Jozefowicz et al. 2015, section 2.2).
    """
    hidden_size = config.hidden_size
    if config.cell == "mingru":
        return MinGRU(input_size, hidden_size)
    if config.cell == "hypergru":
        return HyperGRU(input_size, hidden_size, config.hyper_size)
    if config.cell == "gru":
        gru = nn.GRU(input_size, hidden_size, batch_first=True)
        init_gates(gru, 3)
        return gru
    lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
    init_gates(lstm, 4)
    bias = dict(lstm.named_parameters())["bias_ih_l0"].detach()
    nn.init.ones_(bias[hidden_size : 2 * hidden_size])  # torch's order of gates: i, f, g, o
    return lstm
