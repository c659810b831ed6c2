"""Which parameters weight decay pulls to zero, and which of them Muon steps."""

from typing import Any

from torch import nn

from videogru.config import TrainConfig
from videogru.errors import ConfigError
from videogru.models.cells.conv_gru import ConvGRU


def decay_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights of linear, convolutional and recurrent layers decay.

    Biases, norms, queries, positions and modulations do not: zero is no neutral value for them.
    """
    decaying = {id(weight) for weight in _weights(model)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decaying], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def muon_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups for Muon: the kernels of all convolutions but the first, then those of `decay_groups`.

    The first convolution reads pixels, not features; a depthwise one is no matrix, its channels do not meet. With
    train.muon_recurrent also the gates of GRUs, ConvGRUs and LSTMs, each a matrix of its own. Raises ConfigError where
    nothing is left.
    """
    recurrent = {id(m) for layer in model.modules() if isinstance(layer, ConvGRU) for m in layer.modules()}
    convolutions = [
        m
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Conv3d) and m.weight.requires_grad and id(m) not in recurrent
    ]
    kernels = [m.weight for m in convolutions[1:] if m.groups == 1]
    gates = _gates(model) if config.muon_recurrent else {}
    if not kernels and not gates:
        raise ConfigError(
            "muon steps the kernels of convolutions behind the first, and this encoder has none",
            where="train.optimizer",
            hint="Use --set train.optimizer=adamw, another encoder, or --set train.muon_recurrent=true.",
        )
    mine = {id(weight) for weight in (*kernels, *(w for weights in gates.values() for w in weights))}
    others = decay_groups(model, lr=config.lr, weight_decay=config.weight_decay)
    for group in others:
        group["params"] = [p for p in group["params"] if id(p) not in mine]
    orthogonal = [
        {"params": weights, "muon": True, "gates": count, "lr": config.muon_lr, "weight_decay": config.weight_decay}
        for count, weights in ((1, kernels), *gates.items())
    ]
    return [group for group in (*orthogonal, *others) if group["params"]]


def _gates(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """The weights of recurrent layers and cells by their number of gates."""
    found: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, ConvGRU):
            for kernel in module.parameters():
                if kernel.ndim == 4 and kernel.requires_grad:
                    found.setdefault(len(kernel) // module.hidden_size, []).append(kernel)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("weight") and parameter.requires_grad:
                    found.setdefault(len(parameter) // module.hidden_size, []).append(parameter)
    return found


def _weights(model: nn.Module) -> list[nn.Parameter]:
    layers = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase)
    return [
        parameter
        for module in model.modules()
        if isinstance(module, layers)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("weight")
    ]
