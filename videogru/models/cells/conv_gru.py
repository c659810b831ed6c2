"""A recurrent part that keeps the map: a GRU whose products are convolutions, over depth or time, one way or both."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videogru.config import ModelConfig
from videogru.models.cells.cells import init_gates
from videogru.models.recurrent import Recurrent, reversed_order
from videogru.models.serialize import valid_steps
from videogru.models.streaming import State, of_part, prefixed
from videogru.shapes import FeatureMaps, Lengths

_KERNEL = 3


class ConvGRU(nn.Module):
    """Maps (B T D h w) to states (B T H h w): one layer, one direction.

    Ballas et al. 2016 (arXiv:1511.06432, section 3.1, eq. 7 to 10), with 3x3 kernels and zeros beyond the edge:

        z_t = sigmoid(W_z * x_t + U_z * h_(t-1)), r_t alike
        n_t = tanh(W * x_t + U * (r_t . h_(t-1)))
        h_t = (1 - z_t) . h_(t-1) + z_t . n_t
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        side = _KERNEL // 2
        self.from_input = nn.Conv2d(input_size, 3 * hidden_size, _KERNEL, padding=side)  # z, r, n
        self.to_gates = nn.Conv2d(hidden_size, 2 * hidden_size, _KERNEL, padding=side, bias=False)  # z, r
        self.to_new = nn.Conv2d(hidden_size, hidden_size, _KERNEL, padding=side, bias=False)
        for layer, gates in ((self.from_input, 3), (self.to_gates, 2), (self.to_new, 1)):
            init_gates(layer, gates)

    def forward(
        self, maps: FeatureMaps, state: Float[Tensor, "1 B H h w"] | None = None
    ) -> tuple[Float[Tensor, "B T H h w"], Float[Tensor, "1 B H h w"]]:
        """States after each step, and the last; without `state` the first step starts from zero."""
        B, T, _, h, w = maps.shape
        # All inputs are known: their convolutions are one.
        from_inputs = self.from_input(maps.flatten(0, 1)).unflatten(0, (B, T))
        hidden = maps.new_zeros(B, self.hidden_size, h, w) if state is None else state[0]
        outputs = []
        for from_input in from_inputs.unbind(1):
            gates, new = from_input.split((2 * self.hidden_size, self.hidden_size), dim=1)
            update, reset = torch.sigmoid(gates + self.to_gates(hidden)).chunk(2, dim=1)
            new = torch.tanh(new + self.to_new(reset * hidden))
            hidden = torch.lerp(hidden, new, update)
            outputs.append(hidden)
        return torch.stack(outputs, dim=1), hidden.unsqueeze(0)


class ConvRecurrent(Recurrent):
    """Maps (B T D h w), of which the first `lengths` (B,) are valid, to (B T F), F = `out_size`; zeros at padded steps.

    A `Recurrent` of ConvGRU layers on maps; the last layer's states are averaged over h and w at each step, and
    LayerNorm acts on these means.
    """

    @staticmethod
    def layer_of(config: ModelConfig, input_size: int) -> nn.Module:
        """One layer, one direction."""
        return ConvGRU(input_size, config.hidden_size)

    @staticmethod
    def shortcut_of(input_size: int, output_size: int) -> nn.Module:
        """A 1x1 convolution where the widths differ."""
        if input_size == output_size:
            return nn.Identity()
        linear = nn.Conv2d(input_size, output_size, 1, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        return linear

    def forward(self, maps: FeatureMaps, lengths: Lengths) -> Float[Tensor, "B T F"]:
        """Mean states after each step, in the order of the steps."""
        with torch.autocast(maps.device.type, enabled=False):
            if maps.dtype in (torch.bfloat16, torch.float16):
                maps = maps.float()
            padded = ~valid_steps(lengths, maps.shape[1])
            states = maps.masked_fill(padded[:, :, None, None, None], 0.0)  # whatever padding holds stops here
            order = reversed_order(lengths, maps.shape[1])
            clip = torch.arange(len(maps), device=maps.device).unsqueeze(1)
            for index, ahead in enumerate(self.forward_layers):
                inputs = self.input_dropout(states)
                outputs = self._read(ahead, inputs)
                if self.bidirectional:
                    back = self._read(self.backward_layers[index], inputs[clip, order])
                    outputs = torch.cat((outputs, back[clip, order]), dim=2)
                if len(self.shortcuts):
                    added = self.shortcuts[index](states.flatten(0, 1)).unflatten(0, states.shape[:2])
                    outputs = outputs + added
                states = outputs
            normed: Tensor = self.norm(states.mean(dim=(3, 4)))
            return normed.masked_fill(padded.unsqueeze(-1), 0.0)

    def step(self, maps: FeatureMaps, state: State) -> tuple[Float[Tensor, "B N F"], State]:
        """Mean states after each of N more maps (B N D h w), and what to keep; only where it is not bidirectional."""
        with torch.autocast(maps.device.type, enabled=False):
            states, kept = maps.float() if maps.dtype in (torch.bfloat16, torch.float16) else maps, State()
            for index in range(len(self.forward_layers)):
                outputs, after = self._go_on(index, states, of_part(str(index), state))
                kept |= prefixed(str(index), after)
                if len(self.shortcuts):
                    outputs = outputs + self.shortcuts[index](states.flatten(0, 1)).unflatten(0, states.shape[:2])
                states = outputs
            normed: Tensor = self.norm(states.mean(dim=(3, 4)))
            return normed, kept
