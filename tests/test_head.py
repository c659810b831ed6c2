"""Poolings against loops over clips."""

import math

import pytest
import torch

from videogru.config import ModelConfig
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


@pytest.mark.parametrize("mode", POOLINGS)
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
