"""Against packed torch layers with the same weights, and a GRU cell written out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from videogru.config import ModelConfig
from videogru.models.recurrent import Recurrent, reversed_order

LENGTHS = torch.tensor([7, 1, 4, 6])
CELLS = ["gru", "lstm", "hypergru", "mingru"]


def make(input_size: int = 5, dtype: torch.dtype = torch.float32, **settings) -> Recurrent:
    torch.manual_seed(3)
    config = ModelConfig(**{"hidden_size": 6, "layer_norm": False, "input_dropout": 0.0, **settings})
    return Recurrent(config, input_size).to(dtype)


def make_steps(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)


def packed(part: Recurrent, cell: str, steps: torch.Tensor) -> torch.Tensor:
    """One torch layer stack with the weights of `part`, over packed steps."""
    two = len(part.backward_layers) > 0
    kind = nn.GRU if cell == "gru" else nn.LSTM
    first = part.forward_layers[0]
    stack = kind(first.input_size, first.hidden_size, len(part.forward_layers), batch_first=True, bidirectional=two)
    stack = stack.to(steps.dtype)
    tensors = {}
    for suffix, layers in (("", part.forward_layers), ("_reverse", part.backward_layers)):
        for index, layer in enumerate(layers):
            for name, tensor in layer.state_dict().items():
                tensors[name.replace("_l0", f"_l{index}{suffix}")] = tensor
    stack.load_state_dict(tensors)
    outputs, _ = stack(pack_padded_sequence(steps, LENGTHS, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(outputs, batch_first=True, total_length=steps.shape[1])[0]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("temporal", ["bi", "causal"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_packed_torch_layers(cell, temporal, num_layers, dtype, tolerance):
    part = make(dtype=dtype, cell=cell, temporal=temporal, num_layers=num_layers)
    steps = make_steps(dtype)
    mine, theirs = part(steps, LENGTHS), packed(part, cell, steps)
    assert mine.shape == (4, 7, part.out_size)
    assert part.out_size == (12 if temporal == "bi" else 6)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_equal_those_of_packed_layers(cell):
    part = make(dtype=torch.float64, cell=cell, num_layers=2)
    mine, theirs = make_steps(torch.float64).requires_grad_(), make_steps(torch.float64).requires_grad_()
    part(mine, LENGTHS).square().sum().backward()
    packed(part, cell, theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-13)


def test_equals_a_gru_written_by_hand():
    part = make(dtype=torch.float64, temporal="causal")
    weights = part.forward_layers[0]
    nn.init.normal_(weights.bias_ih_l0)
    nn.init.normal_(weights.bias_hh_l0)
    steps = make_steps(torch.float64)
    (w_r, w_z, w_n), (u_r, u_z, u_n) = weights.weight_ih_l0.chunk(3), weights.weight_hh_l0.chunk(3)
    (b_r, b_z, b_n), (c_r, c_z, c_n) = weights.bias_ih_l0.chunk(3), weights.bias_hh_l0.chunk(3)
    for clip, length in enumerate(LENGTHS.tolist()):
        state = torch.zeros(6, dtype=torch.float64)
        for step in range(length):
            x = steps[clip, step]
            reset = torch.sigmoid(w_r @ x + b_r + u_r @ state + c_r)
            update = torch.sigmoid(w_z @ x + b_z + u_z @ state + c_z)
            new = torch.tanh(w_n @ x + b_n + reset * (u_n @ state + c_n))
            state = (1 - update) * new + update * state
            torch.testing.assert_close(part(steps, LENGTHS)[clip, step], state, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell", [*CELLS, "none"])
@pytest.mark.parametrize("temporal", ["bi", "causal"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_padding_is_zero_in_the_output_and_changes_nothing(cell, temporal, residual, garbage):
    part = make(cell=cell, temporal=temporal, residual=residual, num_layers=2, layer_norm=True).eval()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)  # at the start a hypergru is a gru
    steps = make_steps()
    for clip, length in enumerate(LENGTHS.tolist()):
        steps[clip, length:] = garbage
    outputs = part(steps, LENGTHS)
    for clip, length in enumerate(LENGTHS.tolist()):
        alone = part(steps[clip : clip + 1, :length], LENGTHS[clip : clip + 1])
        torch.testing.assert_close(outputs[clip : clip + 1, :length], alone, rtol=0, atol=1e-5)
        assert torch.count_nonzero(outputs[clip, length:]) == 0


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("residual", [False, True])
def test_causal_states_do_not_see_the_future_and_bidirectional_ones_do(cell, residual):
    steps, changed = make_steps(), make_steps()
    changed[:, 5] += 1
    lengths = torch.full((4,), 7)
    for temporal in ("causal", "bi"):
        part = make(cell=cell, residual=residual, temporal=temporal, num_layers=2)
        before = (part(steps, lengths) - part(changed, lengths))[:, :5]
        assert bool((before == 0).all()) == (temporal == "causal")


def test_without_a_cell_valid_steps_pass_unchanged():
    part = make(cell="none")
    outputs = part(make_steps(), LENGTHS)
    assert part.out_size == 5
    assert sum(p.numel() for p in part.parameters()) == 0
    for clip, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(outputs[clip, :length], make_steps()[clip, :length])


def test_input_dropout_acts_in_training_only():
    part, lengths = make(input_dropout=0.5), torch.full((4,), 7)
    assert not torch.equal(part(make_steps(), lengths), part(make_steps(), lengths))
    part.eval()
    assert torch.equal(part(make_steps(), lengths), part(make_steps(), lengths))


def test_layer_norm_centers_each_valid_state():
    outputs = make(layer_norm=True)(make_steps(), LENGTHS)
    torch.testing.assert_close(outputs.mean(-1), torch.zeros(4, 7), rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0].var(-1, correction=0), torch.ones(7), rtol=0, atol=0.01)


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("lstm", 4)])
def test_each_gate_is_xavier_uniform(cell, gates):
    part = make(input_size=96, cell=cell, hidden_size=64)
    for layer in (part.forward_layers[0], part.backward_layers[0]):
        for weight, fan_in in ((layer.weight_ih_l0, 96), (layer.weight_hh_l0, 64)):
            bound = math.sqrt(6 / (fan_in + 64))
            for gate in weight.detach().chunk(gates):
                assert float(gate.abs().max()) <= bound
                assert float(gate.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        forget = torch.zeros(gates, 64)
        forget[1] = 1.0 if cell == "lstm" else 0.0
        assert torch.equal(layer.bias_ih_l0 + layer.bias_hh_l0, forget.flatten())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("residual", [False, True])
def test_every_parameter_gets_a_gradient(cell, residual):
    part = make(cell=cell, residual=residual, num_layers=2, layer_norm=True)
    if cell == "hypergru":
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.3)  # at the start the small GRU changes nothing
    part(make_steps(), LENGTHS).square().mul(make(hidden_size=6, cell=cell)(make_steps(), LENGTHS)).sum().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("cell", CELLS)
def test_states_stay_float32_under_autocast(cell):
    part, steps = make(cell=cell, residual=True), make_steps()
    outside = part(steps, LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(part(steps, LENGTHS), outside)
        assert part(steps.bfloat16(), LENGTHS).dtype == torch.float32


def test_reversed_order_mirrors_the_valid_steps():
    order = reversed_order(torch.tensor([1, 3, 4]), 4)
    assert order.tolist() == [[0, 1, 2, 3], [2, 1, 0, 3], [3, 2, 1, 0]]
    assert torch.equal(order.gather(1, order), torch.arange(4).expand(3, 4))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("temporal", ["bi", "causal"])
@pytest.mark.parametrize("residual", [False, True])
def test_layers_in_a_row_clip_by_clip(cell, temporal, residual):
    part = make(dtype=torch.float64, cell=cell, temporal=temporal, residual=residual, num_layers=3)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    outputs = part(make_steps(torch.float64), LENGTHS)
    assert outputs.shape[-1] == part.out_size == (12 if temporal == "bi" else 6)
    for clip, length in enumerate(LENGTHS.tolist()):
        states = make_steps(torch.float64)[clip : clip + 1, :length]
        for index, layer in enumerate(part.forward_layers):
            read = [layer(states)[0]]
            if temporal == "bi":
                read.append(part.backward_layers[index](states.flip(1))[0].flip(1))
            before, states = states, torch.cat(read, dim=-1)
            if residual:
                wider = before.shape[-1] != states.shape[-1]
                states = states + (before @ part.shortcuts[index].weight.T if wider else before)
        torch.testing.assert_close(outputs[clip : clip + 1, :length], states, rtol=0, atol=1e-12)
    projected = [name for name, _ in part.named_parameters() if name.startswith("shortcuts")]
    assert projected == (["shortcuts.0.weight"] if residual else [])


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_added_is_the_input_before_dropout(cell):
    part = make(input_size=6, cell=cell, temporal="causal", residual=True, input_dropout=0.5)
    steps, lengths = torch.randn(4, 7, 6), torch.full((4,), 7)
    for parameter in part.parameters():
        nn.init.zeros_(parameter)  # every layer's states are then zero
    assert torch.equal(part(steps, lengths), steps)


def test_a_residual_projection_is_xavier_uniform():
    weight = make(input_size=96, hidden_size=64, residual=True).shortcuts[0].weight.detach()
    bound = math.sqrt(6 / (96 + 128))
    assert weight.shape == (128, 96)
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_initial_values_are_drawn_in_the_order_of_the_first_release(cell):
    part = make(cell=cell, num_layers=2)
    torch.manual_seed(3)
    for size, layers in ((5, (part.forward_layers[0], part.backward_layers[0])), (12, (part.forward_layers[1],))):
        for layer in layers:
            expected = (nn.GRU if cell == "gru" else nn.LSTM)(size, 6, batch_first=True)  # draws, too
            for name in ("weight_ih_l0", "weight_hh_l0"):
                for gate in getattr(expected, name).detach().split(6):
                    nn.init.xavier_uniform_(gate)
                assert torch.equal(getattr(layer, name), getattr(expected, name)), name


@pytest.mark.parametrize(("input_size", "hidden_size", "num_layers"), [(5, 6, 1), (512, 128, 1), (64, 32, 3)])
@pytest.mark.parametrize("temporal", ["bi", "causal"])
def test_a_gru_has_three_quarters_of_the_parameters_of_an_lstm(input_size, hidden_size, num_layers, temporal):
    widths = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "temporal": temporal}
    gru, lstm = (sum(p.numel() for p in make(cell=cell, **widths).parameters()) for cell in ("gru", "lstm"))
    assert 4 * gru == 3 * lstm


def test_a_mingru_has_no_recurrent_matrix():
    parameters = make(cell="mingru", temporal="causal").parameters()
    assert sorted(tuple(p.shape) for p in parameters) == [(12,), (12, 5)]
