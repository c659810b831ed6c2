"""The part that reads the steps in order: GRU or LSTM layers over padded clips, exact without packing.

A bidirectional layer is two unidirectional ones; the second reads each clip's valid steps reversed by a gather. That
equals `pack_padded_sequence` (a test compares them), and unlike packing it exports to ONNX and compiles.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from videogru.config import ModelConfig
from videogru.models.serialize import valid_steps
from videogru.shapes import Lengths, Steps

_GATES = {"gru": 3, "lstm": 4}


class Recurrent(nn.Module):
    """Steps (B S D), of which the first `lengths` (B,) are valid, to (B S F), F = `out_size`; zeros at padded steps.

    F is hidden_size, twice that where `temporal` is bi: forward states, then backward states. Cell `none` hands the
    steps on as they are (F = D): the order-free twin. Runs in float32 at least, also under autocast: bfloat16 would
    save a fifth of this part's time, little of a whole step, and rounds at every state update.
    """

    def __init__(self, config: ModelConfig, input_size: int) -> None:
        super().__init__()
        self.bidirectional = config.cell != "none" and config.temporal == "bi"
        self.forward_layers = nn.ModuleList()
        self.backward_layers = nn.ModuleList()
        size = input_size
        if config.cell != "none":
            for _ in range(config.num_layers):
                self.forward_layers.append(_layer(config.cell, size, config.hidden_size))
                if self.bidirectional:
                    self.backward_layers.append(_layer(config.cell, size, config.hidden_size))
                size = config.hidden_size * (2 if self.bidirectional else 1)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.norm: nn.Module = nn.LayerNorm(size) if config.layer_norm else nn.Identity()
        self.out_size = size

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
                states = ahead(inputs)[0]
                if order is not None:
                    back = self.backward_layers[index](_reorder(inputs, order))[0]
                    states = torch.cat((states, _reorder(back, order)), dim=-1)
            normed: Tensor = self.norm(states)
            return normed.masked_fill(padded, 0.0)


def reversed_order(lengths: Lengths, total: int) -> Int64[Tensor, "B S"]:
    """For each clip length-1, ..., 0, then the padded steps in place; it is its own inverse."""
    places = torch.arange(total, device=lengths.device)
    mirrored = lengths.unsqueeze(1) - 1 - places
    return torch.where(mirrored >= 0, mirrored, places)


def _reorder(steps: Float[Tensor, "B S D"], order: Int64[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    return steps.gather(1, order.unsqueeze(-1).expand(-1, -1, steps.shape[-1]))


def _layer(cell: str, input_size: int, hidden_size: int) -> nn.GRU | nn.LSTM:
    """One layer, one direction; each gate's blocks Xavier-uniform (Glorot and Bengio 2010, eq. 16), as in the article.

    Biases are zero, but for the forget gate of an LSTM: one (Jozefowicz et al. 2015, section 2.2).
    """
    kind = nn.GRU if cell == "gru" else nn.LSTM
    layer = kind(input_size, hidden_size, batch_first=True)
    for name, parameter in layer.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.detach().chunk(_GATES[cell]):
                nn.init.xavier_uniform_(gate)
        else:
            nn.init.zeros_(parameter)
            if cell == "lstm" and name == "bias_ih_l0":
                nn.init.ones_(parameter.detach()[hidden_size : 2 * hidden_size])  # torch's order of gates: i, f, g, o
    return layer
