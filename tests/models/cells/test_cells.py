"""Against torch's GRU where the modulation is the identity, and against loops written out by hand."""

import math

import pytest
import torch
from torch import nn

from videogru.models.cells import cells
from videogru.models.cells.cells import EMBEDDING_SIZE, HyperGRU, MinGRU, _by_doubling, linear_recurrence


def hyper(*, at_random: bool) -> HyperGRU:
    torch.manual_seed(0)
    layer = HyperGRU(3, 4, 5).double()
    for parameter in (layer if at_random else layer.main).parameters():
        nn.init.normal_(parameter, std=0.5)
    if not at_random:
        with torch.no_grad():  # rows of sum one, to more digits than float32 has
            layer.scales.div_(layer.scales.sum(-1, keepdim=True))
    return layer


def plain(layer: HyperGRU) -> nn.GRU:
    """The GRU of torch with the main weights."""
    gru = nn.GRU(layer.input_size, layer.hidden_size, batch_first=True).double()
    gru.load_state_dict({f"{name}_l0": tensor for name, tensor in layer.main.state_dict().items()})
    return gru


def steps(total: int = 6) -> torch.Tensor:
    return torch.randn(2, total, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_without_modulation_a_hypergru_is_torchs_gru_with_the_same_weights():
    layer = hyper(at_random=False)
    for parameter in layer.hyper.parameters():  # whatever the small GRU does
        nn.init.normal_(parameter, std=2)
    gru = plain(layer)
    mine, theirs = steps().requires_grad_(), steps().requires_grad_()
    outputs, (last, _) = layer(mine)
    expected, expected_last = gru(theirs)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-12)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    for one, other in zip(layer.main.parameters(), gru.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def by_hand(layer: HyperGRU, clip: torch.Tensor) -> torch.Tensor:
    """One clip (S D) through a hypernetwork in which every modulated matrix is really built."""
    state, small = clip.new_zeros(4), clip.new_zeros(5)
    w, u = layer.main.weight_ih.chunk(3), layer.main.weight_hh.chunk(3)
    b, c = layer.main.bias_ih.chunk(3), layer.main.bias_hh.chunk(3)
    states = []
    for x in clip:
        small = layer.hyper(torch.cat((x, state))[None], small[None])[0]
        ones, zeros = layer.scale_embeddings(small), layer.shift_embeddings(small)
        d = [layer.scales[i] @ ones[i * EMBEDDING_SIZE : (i + 1) * EMBEDDING_SIZE] for i in range(6)]
        s = [layer.shifts[i] @ zeros[i * EMBEDDING_SIZE : (i + 1) * EMBEDDING_SIZE] for i in range(3)]
        from_x = [torch.diag(d[g]) @ w[g] @ x + b[g] + s[g] for g in range(3)]
        from_h = [torch.diag(d[3 + g]) @ u[g] @ state + c[g] for g in range(3)]
        reset, update = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
        state = (1 - update) * torch.tanh(from_x[2] + reset * from_h[2]) + update * state
        states.append(state)
    return torch.stack(states)


def test_a_modulated_hypergru_equals_matrices_scaled_by_hand():
    layer = hyper(at_random=True)
    outputs, _ = layer(steps())
    for mine, clip in zip(outputs, steps(), strict=True):
        torch.testing.assert_close(mine, by_hand(layer, clip), rtol=0, atol=1e-12)
    assert (outputs - plain(layer)(steps())[0]).abs().max() > 0.05


def test_gradients_of_a_hypergru_are_those_of_the_function():
    layer = hyper(at_random=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def outputs(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (inputs,))[0]

    assert torch.autograd.gradcheck(outputs, (steps(3).requires_grad_(), *values))


def test_the_modulation_learns_from_the_start_and_its_entries_differ():
    torch.manual_seed(0)
    layer, inputs = HyperGRU(3, 4, 5), torch.randn(2, 4, 3)
    untouched = {"hyper.weight_ih", "hyper.weight_hh", "hyper.bias_ih", "hyper.bias_hh", "shift_embeddings.weight"}
    for step in range(2):  # at first the small GRU has no effect, and nothing behind a map of zeros has either
        layer.zero_grad()
        layer(inputs)[0].square().sum().backward()
        still = {name for name, parameter in layer.named_parameters() if not parameter.grad.any()}
        assert still == (untouched if step == 0 else set())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
    entries = layer.scale_embeddings.weight.detach().unflatten(0, (6, EMBEDDING_SIZE))
    assert all(int(torch.linalg.matrix_rank(embedding)) > 1 for embedding in entries)


@pytest.mark.parametrize("kind", ["hypergru", "mingru"])
def test_two_halves_with_a_carried_state_are_the_whole(kind):
    torch.manual_seed(0)
    layer = hyper(at_random=True) if kind == "hypergru" else MinGRU(3, 4).double()
    whole, last = layer(steps())
    first, state = layer(steps()[:, :2])
    second, end = layer(steps()[:, 2:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=0, atol=1e-13)
    assert [part.shape for part in last] == [part.shape for part in end]
    for mine, theirs in zip(end, last, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 33])
def test_a_mingru_equals_a_loop(total, scan):
    torch.manual_seed(0)
    layer = MinGRU(3, 4).double()
    nn.init.normal_(layer.project.bias)
    (w_z, w_h), (b_z, b_h) = layer.project.weight.chunk(2), layer.project.bias.chunk(2)
    outputs, last = layer(steps(total))
    assert last.shape == (1, 2, 4)
    assert torch.equal(last[0], outputs[:, -1])
    for mine, clip in zip(outputs, steps(total), strict=True):
        state = torch.zeros(4, dtype=torch.float64)
        for place, x in enumerate(clip):
            z = torch.sigmoid(w_z @ x + b_z)
            state = (1 - z) * state + z * (w_h @ x + b_h)
            torch.testing.assert_close(mine[place], state, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kind", "gates"), [("hypergru", 3), ("mingru", 2)])
def test_each_gate_is_xavier_uniform(kind, gates):
    layer = HyperGRU(96, 64, 48) if kind == "hypergru" else MinGRU(96, 64)
    weights = {"mingru": ["project"], "hypergru": ["main", "hyper"]}[kind]
    for name, weight in ((n, w) for part in weights for n, w in getattr(layer, part).named_parameters()):
        if name.startswith("bias"):
            assert not weight.any()
            continue
        size = weight.shape[0] // gates
        bound = math.sqrt(6 / (size + weight.shape[1]))
        for gate in weight.detach().split(size):
            assert float(gate.abs().max()) <= bound
            assert float(gate.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.fixture(params=["chunks", "loop"])
def scan(request, monkeypatch):
    """Both ways to run the recurrence on a CPU, whatever the size."""
    monkeypatch.setattr(cells, "_WIDE", 0 if request.param == "loop" else 10**9)


@pytest.mark.parametrize("total", [1, 2, 5, 8])
def test_gradients_of_the_scan_are_those_of_the_recurrence(total, scan):
    generator = torch.Generator().manual_seed(0)
    keep, add = (torch.rand(2, total, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    start = torch.rand(2, 3, dtype=torch.float64, generator=generator)
    inputs = tuple(tensor.requires_grad_() for tensor in (keep, add, start))
    assert torch.autograd.gradcheck(linear_recurrence, inputs)


def test_the_scan_stays_exact_over_thousands_of_steps(scan):
    generator = torch.Generator().manual_seed(0)
    keep, add = (torch.rand(1, 5000, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    keep[:, 1000:1010] = 0  # a full reset
    keep[:, 2000:2500] = 1  # nothing is forgotten
    state, loop = torch.zeros(1, 2, dtype=torch.float64), []
    for step in range(5000):
        state = keep[:, step] * state + add[:, step]
        loop.append(state)
    states = linear_recurrence(keep, add, torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(states, torch.stack(loop, dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("total", [1, 2, 7, 16, 33])
def test_the_scan_of_exported_graphs_is_the_same_recurrence(total):
    generator = torch.Generator().manual_seed(0)
    decay, added = (torch.rand(2, total, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    start = torch.rand(2, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        _by_doubling(decay, added, start), linear_recurrence(decay, added, start), rtol=0, atol=1e-13
    )
