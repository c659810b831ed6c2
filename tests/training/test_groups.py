"""By name: what decays, and what Muon steps."""

import pytest
import torch
from torch import nn

from videogru.config import ModelConfig, TrainConfig
from videogru.errors import ConfigError
from videogru.models.classifier import Classifier
from videogru.training.groups import decay_groups, muon_groups


def make(**settings) -> Classifier:
    config = ModelConfig(**{"encoder_width": 4, "hidden_size": 6, "seq": "grid", **settings})
    return Classifier(config, in_channels=3, frame_size=32, num_classes=3, mean=(0.5,) * 3, std=(0.5,) * 3)


MUON = TrainConfig(optimizer="muon", muon_lr=0.1, lr=0.01, weight_decay=0.5)


def names(model: nn.Module, group: dict) -> set[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(parameter)] for parameter in group["params"]}


def test_neither_biases_nor_norms_nor_queries_nor_modulations_decay():
    model = make(cell="hypergru", temporal="causal", pooling="multihead", local_attention=2, residual=True)
    decaying, resting = decay_groups(model, lr=0.1, weight_decay=0.5)
    assert (decaying["weight_decay"], resting["weight_decay"]) == (0.5, 0.0)
    assert names(model, decaying) | names(model, resting) == {name for name, _ in model.named_parameters()}
    for name in names(model, resting):
        assert (
            name.endswith(("bias", "bias_ih", "bias_hh", "scales", "shifts", "queries"))
            or "norm" in name
            or ("bn" in name or "shortcut.2" in name)
        ), name
    layer = "recurrent.forward_layers.0."
    assert {"local_attention.position_bias", f"{layer}scales", f"{layer}shifts"} <= names(model, resting)
    assert {
        "encoder.layers.stem.weight",
        f"{layer}main.weight_ih",
        f"{layer}hyper.weight_hh",
        "recurrent.shortcuts.0.weight",
        "local_attention.query.weight",
        "head.linear.weight",
    } <= names(model, decaying)


def test_a_query_of_attention_rests_whatever_its_shape():
    model = make(pooling="attention")
    _, resting = decay_groups(model, lr=0.1, weight_decay=0.5)
    assert "head.query" in names(model, resting)


def test_muon_steps_all_kernels_but_the_first():
    model = make(encoder="airbench")
    kernels, *others = muon_groups(model, MUON)
    wanted = {f"encoder.layers.stage{stage}.conv{number}.weight" for stage in (1, 2, 3) for number in (1, 2)}
    assert names(model, kernels) == wanted
    assert (kernels["muon"], kernels["lr"], kernels["weight_decay"]) == (True, 0.1, 0.5)
    rest = [name for group in others for name in names(model, group)]
    assert sorted([*wanted, *rest]) == sorted(name for name, _ in model.named_parameters())
    assert all(group["lr"] == 0.01 and "muon" not in group for group in others)


def test_depthwise_kernels_are_no_matrices():
    model = make(encoder="mobilenet_v3_small")
    kernels, *_ = muon_groups(model, MUON)
    depthwise = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1
    }  # fmt: skip
    assert len(depthwise) == 11
    assert not depthwise & names(model, kernels)


@pytest.mark.parametrize("encoder", ["pixels", "sweeps"])
def test_without_kernels_muon_is_refused(encoder):
    with pytest.raises(ConfigError, match="this encoder has none"):
        muon_groups(make(encoder=encoder), MUON)


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("lstm", 4)])
def test_muon_steps_gates_where_asked(cell, gates):
    model = make(encoder="pixels", cell=cell, num_layers=2)
    first, *others = muon_groups(model, MUON.model_copy(update={"muon_recurrent": True}))
    assert names(model, first) == {
        name for name, _ in model.named_parameters() if name.startswith("recurrent") and "weight_" in name
    }
    assert len(names(model, first)) == 8
    assert (first["muon"], first["gates"]) == (True, gates)
    rest = [name for group in others for name in names(model, group)]
    assert sorted([*names(model, first), *rest]) == sorted(name for name, _ in model.named_parameters())


def test_gates_without_muon_are_refused():
    with pytest.raises(ValueError, match=r"muon_recurrent needs train\.optimizer=muon"):
        TrainConfig(muon_recurrent=True)


def test_frozen_parameters_stay_out():
    model = make()
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    groups = decay_groups(model, lr=0.1, weight_decay=0.5)
    assert not any(name.startswith("encoder") for group in groups for name in names(model, group))
    assert torch.optim.AdamW(groups)
