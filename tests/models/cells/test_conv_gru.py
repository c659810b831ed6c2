"""The ConvGRU against loops over cells, against a plain GRU where maps have one cell, and clip by clip."""

import math

import pytest
import torch
from torch import nn

from videogru.config import ModelConfig
from videogru.models.cells.conv_gru import ConvGRU, ConvRecurrent
from videogru.models.classifier import Classifier
from videogru.training.groups import muon_groups

LENGTHS = torch.tensor([5, 1, 3])


def make(input_size: int = 3, **settings) -> ConvRecurrent:
    torch.manual_seed(2)
    config = ModelConfig(**{"cell": "convgru", "hidden_size": 4, "layer_norm": False, "input_dropout": 0.0, **settings})
    part = ConvRecurrent(config, input_size).double()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    return part


def make_maps(d: int = 3, h: int = 4, w: int = 5) -> torch.Tensor:
    return torch.randn(3, 5, d, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(layer: ConvGRU, maps: torch.Tensor) -> torch.Tensor:
    """(T D h w) -> (T H h w), each cell by sums over its neighbors, without a convolution."""
    T, _, h, w = maps.shape
    H = layer.hidden_size
    (w_z, w_r, w_n), (b_z, b_r, b_n) = layer.from_input.weight.chunk(3), layer.from_input.bias.chunk(3)
    (u_z, u_r), u_n = layer.to_gates.weight.chunk(2), layer.to_new.weight

    def around(kernel: torch.Tensor, picture: torch.Tensor, y: int, x: int) -> torch.Tensor:
        total = torch.zeros(len(kernel), dtype=picture.dtype)
        for dy in range(3):
            for dx in range(3):
                row, column = y + dy - 1, x + dx - 1
                if 0 <= row < h and 0 <= column < w:
                    total = total + kernel[:, :, dy, dx] @ picture[:, row, column]
        return total

    state, states = torch.zeros(H, h, w, dtype=maps.dtype), []
    for t in range(T):
        reset, update = torch.zeros_like(state), torch.zeros_like(state)
        for y in range(h):
            for x in range(w):
                update[:, y, x] = torch.sigmoid(around(w_z, maps[t], y, x) + b_z + around(u_z, state, y, x))
                reset[:, y, x] = torch.sigmoid(around(w_r, maps[t], y, x) + b_r + around(u_r, state, y, x))
        new = torch.zeros_like(state)
        for y in range(h):
            for x in range(w):
                new[:, y, x] = torch.tanh(around(w_n, maps[t], y, x) + b_n + around(u_n, reset * state, y, x))
        state = (1 - update) * state + update * new
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("temporal", ["causal", "bi"])
def test_equals_loops_over_cells_both_ways(temporal):
    part, maps = make(temporal=temporal), make_maps()
    with torch.no_grad():
        outputs = part(maps, LENGTHS)
        for clip, length in enumerate(LENGTHS.tolist()):
            expected = [by_hand(part.forward_layers[0], maps[clip, :length])]
            if temporal == "bi":
                expected.append(by_hand(part.backward_layers[0], maps[clip, :length].flip(0)).flip(0))
            means = torch.cat(expected, dim=1).mean(dim=(2, 3))
            torch.testing.assert_close(outputs[clip, :length], means, rtol=0, atol=1e-12)
            assert torch.count_nonzero(outputs[clip, length:]) == 0
    assert outputs.shape[-1] == part.out_size == (8 if temporal == "bi" else 4)


def test_on_maps_of_one_cell_it_is_a_gru_that_resets_before_the_product():
    """There 3x3 kernels are their middle; torch's GRU resets after the product, so here U is the identity times u."""
    part, maps = make(temporal="causal"), make_maps(h=1, w=1)
    layer = part.forward_layers[0]
    with torch.no_grad():
        layer.to_new.weight.zero_()
        layer.to_new.weight[:, :, 1, 1] = 0.7 * torch.eye(4, dtype=torch.float64)  # then r . (U h) = U (r . h)
        gru = nn.GRU(3, 4, batch_first=True).double()
        z, r, n = layer.from_input.weight[:, :, 1, 1].chunk(3)
        gru.weight_ih_l0.copy_(torch.cat((r, -z, n)))  # torch keeps the state where z is one
        z, r, n = layer.from_input.bias.chunk(3)
        gru.bias_ih_l0.copy_(torch.cat((r, -z, n)))
        gru.bias_hh_l0.zero_()
        z, r = (u[:, :, 1, 1] for u in layer.to_gates.weight.chunk(2))
        gru.weight_hh_l0.copy_(torch.cat((r, -z, 0.7 * torch.eye(4, dtype=torch.float64))))
        expected = gru(maps.flatten(2))[0]
        torch.testing.assert_close(layer(maps)[0].flatten(2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_padding_changes_nothing(residual, garbage):
    part, maps = make(residual=residual, num_layers=2, layer_norm=True).eval(), make_maps()
    for clip, length in enumerate(LENGTHS.tolist()):
        maps[clip, length:] = garbage
    outputs = part(maps, LENGTHS)
    for clip, length in enumerate(LENGTHS.tolist()):
        alone = part(maps[clip : clip + 1, :length], LENGTHS[clip : clip + 1])
        torch.testing.assert_close(outputs[clip : clip + 1, :length], alone, rtol=0, atol=1e-12)


def test_a_state_goes_on_where_the_steps_were_cut():
    layer, maps = make(temporal="causal").forward_layers[0], make_maps()
    first, state = layer(maps[:, :2])
    rest, last = layer(maps[:, 2:], state)
    whole, end = layer(maps)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=0, atol=1e-12)


def test_causal_states_do_not_see_the_future():
    maps, changed, lengths = make_maps(), make_maps(), torch.full((3,), 5)
    changed[:, 3] += 1
    for temporal, blind in (("causal", True), ("bi", False)):
        part = make(temporal=temporal, num_layers=2)
        same = (part(maps, lengths) - part(changed, lengths))[:, :3] == 0
        assert bool(same.all()) == blind


def test_each_gate_is_xavier_uniform():
    layer = ConvGRU(48, 40)
    for kernel, gates in ((layer.from_input.weight, 3), (layer.to_gates.weight, 2), (layer.to_new.weight, 1)):
        bound = math.sqrt(6 / (9 * (kernel.shape[1] + 40)))
        for gate in kernel.detach().chunk(gates):
            assert float(gate.abs().max()) <= bound
            assert float(gate.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not layer.from_input.bias.any()


def classifier(**settings) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder_width": 8, "hidden_size": 6, "cell": "convgru", **settings})
    return Classifier(config, in_channels=1, frame_size=16, num_classes=3, mean=(0.4,), std=(0.2,))


@pytest.mark.parametrize("use_gaps", [False, True])
def test_a_clip_alone_and_in_a_batch(use_gaps):
    model = classifier(use_gaps=use_gaps, num_layers=2).eval()
    if model.gap_embedding is not None:
        nn.init.normal_(model.gap_embedding.linear.weight)
    frames, gaps = torch.rand(3, 5, 1, 16, 16), torch.rand(3, 5) + 0.5
    with torch.no_grad():
        together = model(frames, LENGTHS, gaps)
        for clip, length in enumerate(LENGTHS.tolist()):
            own = slice(clip, clip + 1)
            alone = model(frames[own, :length], LENGTHS[own], gaps[own, :length])
            torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-5)


def test_checkpointing_and_gradients():
    plain, saving = classifier(input_dropout=0.0, dropout=0.0), classifier(input_dropout=0.0, dropout=0.0)
    saving.use_checkpointing(2)
    frames = torch.rand(3, 5, 1, 16, 16)
    for model in (plain, saving):
        model(frames, LENGTHS).square().sum().backward()
    for (name, mine), theirs in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert mine.grad is not None and bool((mine.grad != 0).any()), name
        torch.testing.assert_close(mine.grad, theirs[1].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_it_needs_whole_maps():
    for settings in ({"seq": "rows"}, {"seq": "grid"}, {"local_attention": 2}):
        with pytest.raises(ValueError, match="whole maps"):
            classifier(**settings)


def test_muon_steps_its_gates_apart_and_only_when_asked():
    from videogru.config import TrainConfig

    model = classifier(temporal="causal")
    layer = model.recurrent.forward_layers[0]
    kernels = {id(layer.from_input.weight): 3, id(layer.to_gates.weight): 2, id(layer.to_new.weight): 1}
    for asked in (True, False):
        groups = muon_groups(model, TrainConfig(optimizer="muon", muon_recurrent=asked))
        found = {id(p): group["gates"] for group in groups if group.get("muon") for p in group["params"]}
        assert {key: found.get(key) for key in kernels} == (kernels if asked else dict.fromkeys(kernels))
        every = [id(p) for group in groups for p in group["params"]]
        assert sorted(every) == sorted(id(p) for p in model.parameters())
