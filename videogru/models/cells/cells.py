"""Recurrent layers beside torch's: a GRU modulated by a smaller one, and a GRU without a recurrent matrix.

Both have the interface of torch's layers with batch_first: one layer, one direction.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EMBEDDING_SIZE = 4  # entries of each of the nine embeddings of a HyperGRU, N_z in the paper
_WIDE = 2048  # clips times units above which a CPU is faster step by step than in chunks


class HyperGRU(nn.Module):
    """Steps (B S D) to states (B S H): a GRU whose rows and biases a smaller GRU scales and shifts at every step.

    After HyperLSTM (Ha, Dai and Le 2016, arXiv:1609.09106, section 3.2 and appendix), on torch's GRU: the small
    GRU reads [x_t ; h_(t-1)]; its new state g_t gives an embedding z for each of 3 gates x (W x, U h, b), and linear
    maps of z give scales d and shifts s:

        r_t = sigmoid(d W_r x_t + b_r + s + d U_r h_(t-1) + c_r), the same for z_t (each d, s its own)
        n_t = tanh(d W_n x_t + b_n + s + r_t * (d U_n h_(t-1) + c_n))
        h_t = (1 - z_t) * n_t + z_t * h_(t-1)

    At the start every scale is one and every shift zero, whatever g_t: a plain GRU. As in the paper, embeddings of
    scales start as ones, those of shifts as small noise (sd 0.01) under a map of zeros. Unlike there, the maps to the
    scales are noise of which each row sums to one: from equal entries, all entries of an embedding would learn the
    same. The paper's layer normalization, and the factor 0.1 on the scales that goes with it, are left out.
    """

    def __init__(self, input_size: int, hidden_size: int, hyper_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        # Cells that only hold the parameters: W x of all steps is one product, outside of the loop.
        self.main = nn.GRUCell(input_size, hidden_size)
        self.hyper = nn.GRUCell(input_size + hidden_size, hyper_size)
        self.scale_embeddings = nn.Linear(hyper_size, 6 * EMBEDDING_SIZE)
        self.shift_embeddings = nn.Linear(hyper_size, 3 * EMBEDDING_SIZE, bias=False)
        self.scales = nn.Parameter(torch.empty(6, hidden_size, EMBEDDING_SIZE))  # W x: r, z, n; then U h: r, z, n
        self.shifts = nn.Parameter(torch.empty(3, hidden_size, EMBEDDING_SIZE))
        for cell in (self.main, self.hyper):
            init_gates(cell, 3)
        with torch.no_grad():
            nn.init.zeros_(self.scale_embeddings.weight)
            nn.init.ones_(self.scale_embeddings.bias)
            nn.init.normal_(self.shift_embeddings.weight, std=0.01)
            nn.init.normal_(self.scales, std=1 / EMBEDDING_SIZE)
            self.scales.add_((1 - self.scales.sum(-1, keepdim=True)) / EMBEDDING_SIZE)
            nn.init.zeros_(self.shifts)

    def forward(
        self,
        inputs: Float[Tensor, "B S D"],
        state: tuple[Float[Tensor, "1 B H"], Float[Tensor, "1 B N"]] | None = None,
    ) -> tuple[Float[Tensor, "B S H"], tuple[Float[Tensor, "1 B H"], Float[Tensor, "1 B N"]]]:
        """States after each step, and the last states of both GRUs; without `state` both start at zero."""
        main, hyper, H, N = self.main, self.hyper, self.hidden_size, self.hyper.hidden_size
        B, _, D = inputs.shape
        if state is None:
            h, g = inputs.new_zeros(B, H), inputs.new_zeros(B, N)
        else:
            h, g = state[0][0], state[1][0]
        w = torch.cat((main.weight_ih, hyper.weight_ih[:, :D]))
        offset = torch.cat((torch.zeros_like(main.bias_ih), hyper.bias_ih))
        from_inputs = F.linear(inputs, w, offset)
        u = torch.cat((main.weight_hh, hyper.weight_ih[:, D:])).t()
        modulate, constants = self._modulation()

        outputs = []
        for from_input in from_inputs.unbind(1):
            x, x_hyper = from_input.split((3 * H, 3 * N), dim=1)
            y, y_hyper = (h @ u).split((3 * H, 3 * N), dim=1)
            g = _gru_step(x_hyper + y_hyper, torch.addmm(hyper.bias_hh, g, hyper.weight_hh.t()), g)
            scale_x, scale_y, shift = torch.addmm(constants, g, modulate).chunk(3, dim=1)
            h = _gru_step(torch.addcmul(shift, scale_x, x), torch.addcmul(main.bias_hh, scale_y, y), h)
            outputs.append(h)
        return torch.stack(outputs, dim=1), (h.unsqueeze(0), g.unsqueeze(0))

    def _modulation(self) -> tuple[Float[Tensor, "N G"], Float[Tensor, " G"]]:
        """The two linear maps, to embeddings and from them, as one: small states to scales of W x, of U h, and shifts.

        G = 9 H; the biases b are part of the constants.
        """
        to_scales = self.scale_embeddings.weight.unflatten(0, (6, EMBEDDING_SIZE))
        to_shifts = self.shift_embeddings.weight.unflatten(0, (3, EMBEDDING_SIZE))
        rows = torch.cat((self.scales @ to_scales, self.shifts @ to_shifts)).flatten(0, 1)
        start = self.scale_embeddings.bias.unflatten(0, (6, EMBEDDING_SIZE, 1))
        return rows.t(), torch.cat(((self.scales @ start).flatten(), self.main.bias_ih))


class MinGRU(nn.Module):
    """Steps (B S D) to states (B S H); gate and candidate do not see the state, so all steps are computed in parallel.

    Feng et al. 2024 (arXiv:2410.01201, section 3.1): z_t = sigmoid(W_z x_t + b_z), c_t = W_h x_t + b_h,
    h_t = (1 - z_t) * h_(t-1) + z_t * c_t. Steps that are padding at the end change no state before them.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.project = nn.Linear(input_size, 2 * hidden_size)
        init_gates(self.project, 2)

    def forward(
        self, inputs: Float[Tensor, "B S D"], state: Float[Tensor, "1 B H"] | None = None
    ) -> tuple[Float[Tensor, "B S H"], Float[Tensor, "1 B H"]]:
        """States after each step, and the last; without `state` the first step starts from zero."""
        update, candidate = self.project(inputs).chunk(2, dim=-1)
        start = inputs.new_zeros(inputs.shape[0], self.hidden_size) if state is None else state[0]
        # 1 - sigmoid(x), without its loss of digits
        outputs = linear_recurrence(torch.sigmoid(-update), torch.sigmoid(update) * candidate, start)
        return outputs, outputs[:, -1].clone().unsqueeze(0)  # a view would keep all states alive


def linear_recurrence(
    decay: Float[Tensor, "B S H"], added: Float[Tensor, "B S H"], start: Float[Tensor, "B H"]
) -> Float[Tensor, "B S H"]:
    """h_t = decay_t * h_(t-1) + added_t for t = 1..S, h_0 = start. Keeps decay and h for the gradient, no more."""
    if torch.compiler.is_exporting():
        return _by_doubling(decay, added, start)
    states: Tensor = _LinearRecurrence.apply(decay, added, start)
    return states


class _LinearRecurrence(torch.autograd.Function):
    """The adjoint of the recurrence is the same recurrence backward in time, with the decay of the next step."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
        states = _scan(decay, added, start)
        ctx.save_for_backward(decay, states, start)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, start = ctx.saved_tensors
        following = torch.cat((decay[:, 1:], torch.zeros_like(decay[:, :1])), dim=1)
        adjoint = _scan(following, gradient, torch.zeros_like(start), backward=True)
        before = torch.cat((start.unsqueeze(1), states[:, :-1]), dim=1)
        return adjoint * before, adjoint, adjoint[:, 0] * decay[:, 0]


def _scan(
    decay: Float[Tensor, "B S H"], added: Float[Tensor, "B S H"], start: Float[Tensor, "B H"], backward: bool = False
) -> Float[Tensor, "B S H"]:
    """The recurrence from the first step on, or from the last: in chunks side by side, then with what came before.

    sqrt(S) chunks take 2 sqrt(S) small operations in place of S; one chunk is the plain loop. Products of decays are
    formed within a chunk only, and nothing is divided.
    """
    S, size = added.shape[1], _chunk_size(added)
    fill = (0, 0, 0, -S % size)
    # Lists over the places in a chunk, each (B chunks H).
    decays = F.pad(decay, fill).unflatten(1, (-1, size)).unbind(2)
    addeds = F.pad(added, fill).unflatten(1, (-1, size)).unbind(2)
    B, chunks, H = addeds[0].shape
    places = range(size - 1, -1, -1) if backward else range(size)
    states = added.new_empty(B, chunks, size, H)
    if chunks == 1:
        _run(decays, addeds, start.unsqueeze(1), states, places)
    else:
        zeros = added.new_zeros(B, chunks, H)
        ends = _run(decays, addeds, zeros, states, places)
        products = torch.empty_like(states)
        whole = _run(decays, [zeros] * size, zeros + 1, products, places)
        carried, state = torch.empty_like(ends), start
        for index in range(chunks - 1, -1, -1) if backward else range(chunks):
            carried[:, index] = state
            state = torch.addcmul(ends[:, index], whole[:, index], state)
        states.addcmul_(products, carried.unsqueeze(2))
    return states.flatten(1, 2)[:, :S]


def _by_doubling(
    decay: Float[Tensor, "B S H"], added: Float[Tensor, "B S H"], start: Float[Tensor, "B H"]
) -> Float[Tensor, "B S H"]:
    """The same in log2 S passes without a write in place or a branch on the batch size, which an exported graph needs.

    After a pass a state holds twice as many of the steps before it (Hillis and Steele 1986).
    """
    states = torch.cat((added[:, :1] + decay[:, :1] * start.unsqueeze(1), added[:, 1:]), dim=1)
    reach = 1
    while reach < states.shape[1]:
        states = torch.cat((states[:, :reach], states[:, reach:] + decay[:, reach:] * states[:, :-reach]), dim=1)
        decay = torch.cat((decay[:, :reach], decay[:, reach:] * decay[:, :-reach]), dim=1)
        reach *= 2
    return states


def _run(
    decays: Sequence[Tensor], addeds: Sequence[Tensor], state: Tensor, states: Tensor, places: range
) -> Float[Tensor, "B chunks H"]:
    """Fill `states` (B chunks size H) place by place from `state` on; returns the last."""
    filled = states.unbind(2)
    for place in places:
        state = torch.addcmul(addeds[place], decays[place], state, out=filled[place])
    return state


def _chunk_size(added: Float[Tensor, "B S H"]) -> int:
    """One chunk, the plain loop, where its operations are large enough to hide what starting them costs."""
    B, S, H = added.shape
    if added.device.type == "cpu" and B * H > _WIDE:
        return S
    return math.isqrt(S)


def _gru_step(
    from_input: Float[Tensor, "B G"], from_state: Float[Tensor, "B G"], state: Float[Tensor, "B H"]
) -> Float[Tensor, "B H"]:
    """A step of torch's GRU from its products with biases, G = 3 H: reset, update, new."""
    reset_input, update_input, new_input = from_input.chunk(3, dim=1)
    reset_state, update_state, new_state = from_state.chunk(3, dim=1)
    reset, update = torch.sigmoid(reset_input + reset_state), torch.sigmoid(update_input + update_state)
    new = torch.tanh(torch.addcmul(new_input, reset, new_state))
    return torch.lerp(new, state, update)


def init_gates(layer: nn.Module, gates: int) -> None:
    """Each gate's blocks of every weight Xavier-uniform (Glorot and Bengio 2010, eq. 16); biases zero."""
    for name, parameter in layer.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.detach().chunk(gates):
                nn.init.xavier_uniform_(gate)
        else:
            nn.init.zeros_(parameter)
