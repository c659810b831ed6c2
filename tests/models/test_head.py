"""Poolings against loops over clips."""

import math

import pytest
import torch
from torch import nn

from videogru.config import ModelConfig
from videogru.models.attention import MultiheadPooling
from videogru.models.head import Head, pool

LENGTHS = torch.tensor([3, 1, 5])
POOLINGS = ["last", "mean", "max", "attention"]


@pytest.fixture
def outputs() -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


QUERY = torch.tensor([0.3, -2.0, 1.0, 0.5])


def by_hand(states: torch.Tensor, mode: str, bidirectional: bool) -> torch.Tensor:
    """One clip's valid states (S F) pooled in plain words."""
    if mode == "last":
        return torch.cat((states[-1, :2], states[0, 2:])) if bidirectional else states[-1]
    if mode == "mean":
        return torch.stack([states[:, f].sum() / len(states) for f in range(4)])
    if mode == "max":
        return torch.stack([max(states[:, f]) for f in range(4)])
    weights = [math.exp(float(state @ QUERY) / 2) for state in states]
    return sum(w / sum(weights) * state for w, state in zip(weights, states, strict=True))


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_pooling_equals_a_loop_and_ignores_padding(outputs, mode, bidirectional):
    query = QUERY if mode == "attention" else None
    expected = torch.stack(
        [by_hand(o[:n], mode, bidirectional) for o, n in zip(outputs, LENGTHS.tolist(), strict=True)]
    )
    for garbage in (0.0, 1e6, math.nan):
        for clip, length in enumerate(LENGTHS.tolist()):
            outputs[clip, length:] = garbage
        pooled = pool(outputs, LENGTHS, mode, bidirectional=bidirectional, query=query)
        torch.testing.assert_close(pooled, expected)


def test_an_unknown_pooling_is_refused(outputs):
    with pytest.raises(ValueError, match="median"):
        pool(outputs, LENGTHS, "median")
    with pytest.raises(ValueError, match="attention"):
        pool(outputs, LENGTHS, "attention")


@pytest.mark.parametrize(
    ("cell", "temporal", "halved"), [("gru", "bi", True), ("gru", "causal", False), ("none", "bi", False)]
)
def test_last_takes_the_backward_half_from_the_first_step_only_where_there_is_one(outputs, cell, temporal, halved):
    head = Head(ModelConfig(pooling="last", cell=cell, temporal=temporal, dropout=0.0), 4, 7)
    expected = torch.stack([by_hand(o[:n], "last", halved) for o, n in zip(outputs, LENGTHS.tolist(), strict=True)])
    torch.testing.assert_close(head(outputs, LENGTHS), expected @ head.linear.weight.T + head.linear.bias)


def test_attention_starts_as_the_mean_and_its_query_learns(outputs):
    head = Head(ModelConfig(pooling="attention", dropout=0.0), 4, 2)
    mean = pool(outputs, LENGTHS, "mean")
    torch.testing.assert_close(head(outputs, LENGTHS), head.linear(mean))
    head(outputs, LENGTHS)[:, 0].square().sum().backward()
    assert bool((head.query.grad != 0).all())


def make_multihead(heads: int = 2, size: int = 4) -> MultiheadPooling:
    torch.manual_seed(0)
    return MultiheadPooling(size, heads)


def torch_multihead(layer: MultiheadPooling, size: int, heads: int) -> nn.MultiheadAttention:
    """The layer of torch with the same weights; its query map is the identity."""
    twin = nn.MultiheadAttention(size, heads, batch_first=True)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat((torch.eye(size), layer.key.weight, layer.value.weight)))
        twin.in_proj_bias[size : 2 * size].normal_()  # of the keys: no softmax can see it
        twin.out_proj.weight.copy_(layer.project.weight)
        twin.out_proj.bias.copy_(layer.project.bias)
    return twin


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_multihead_equals_torch_and_so_do_its_gradients(outputs, heads):
    layer = make_multihead(heads)
    twin, padded = torch_multihead(layer, 4, heads), torch.arange(5) >= LENGTHS.unsqueeze(1)
    mine, theirs = outputs.clone().requires_grad_(), outputs.clone().requires_grad_()
    seed = layer.queries.detach().clone().flatten().requires_grad_()
    pooled = layer(mine, LENGTHS)
    expected = twin(seed.expand(3, 1, 4), theirs, theirs, key_padding_mask=padded, need_weights=False)[0][:, 0]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
    pooled.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.queries.grad.flatten(), seed.grad, rtol=0, atol=1e-6)
    for own, part in zip((layer.key, layer.value), twin.in_proj_weight.grad.chunk(3)[1:], strict=True):
        torch.testing.assert_close(own.weight.grad, part, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.project.weight.grad, twin.out_proj.weight.grad, rtol=0, atol=1e-6)


def test_multihead_with_more_features_in_heads_than_in_states_equals_a_loop(outputs):
    layer = make_multihead(heads=3).requires_grad_(False)  # heads of ceil(4 / 3) = 2 features
    keys, values = outputs @ layer.key.weight.T, outputs @ layer.value.weight.T
    for clip, length in enumerate(LENGTHS.tolist()):
        heads = []
        for head, query in enumerate(layer.queries):
            part = slice(2 * head, 2 * head + 2)
            shares = [math.exp(float(keys[clip, s, part] @ query) / math.sqrt(2)) for s in range(length)]
            heads.append(sum(w / sum(shares) * values[clip, s, part] for s, w in enumerate(shares)))
        expected = layer.project.weight @ torch.cat(heads) + layer.project.bias
        torch.testing.assert_close(layer(outputs, LENGTHS)[clip], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e6, math.inf, math.nan])
def test_multihead_of_a_batch_equals_its_members(outputs, garbage):
    layer = make_multihead()
    for clip, length in enumerate(LENGTHS.tolist()):
        outputs[clip, length:] = garbage
    pooled = layer(outputs, LENGTHS)
    alone = [layer(outputs[i : i + 1, :n], LENGTHS[i : i + 1]) for i, n in enumerate(LENGTHS.tolist())]
    torch.testing.assert_close(pooled, torch.cat(alone), rtol=0, atol=1e-6)


def test_gradients_of_multihead_equal_finite_differences(outputs):
    layer, lengths = make_multihead(heads=3).double(), LENGTHS
    names = [name for name, _ in layer.named_parameters()]

    def run(states, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (states, lengths))

    tensors = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (outputs.double().requires_grad_(), *tensors))


def test_a_head_pools_with_as_many_heads_as_are_set(outputs):
    head = Head(ModelConfig(pooling="multihead", attention_heads=2, dropout=0.0), 4, 7)
    assert head.multihead.queries.shape == (2, 2)
    torch.testing.assert_close(head(outputs, LENGTHS), head.linear(head.multihead(outputs, LENGTHS)))


def test_names_of_parameters_by_pooling():
    linear = {"linear.weight", "linear.bias"}
    added = {f"multihead.{name}" for name in ("queries", "key.weight", "value.weight", "project.weight")}
    expected = {"attention": {"query"}, "multihead": {*added, "multihead.project.bias"}}
    for mode in [*POOLINGS, "multihead"]:
        assert set(Head(ModelConfig(pooling=mode), 8, 2).state_dict()) == linear | expected.get(mode, set())


@pytest.mark.parametrize("mode", [*POOLINGS, "multihead"])
def test_every_parameter_gets_a_gradient_and_padding_none(outputs, mode):
    outputs.requires_grad_()
    head = Head(ModelConfig(pooling=mode, dropout=0.0), 4, 3)
    head(outputs, LENGTHS).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name
    for clip, length in enumerate(LENGTHS.tolist()):
        assert bool((outputs.grad[clip, :length] != 0).any())
        assert torch.count_nonzero(outputs.grad[clip, length:]) == 0


def test_dropout_acts_in_training_only(outputs):
    head = Head(ModelConfig(dropout=0.5), 4, 3)
    assert not torch.equal(head(outputs, LENGTHS), head(outputs, LENGTHS))
    head.eval()
    assert torch.equal(head(outputs, LENGTHS), head(outputs, LENGTHS))
