"""Which parameters weight decay pulls to zero, and which of them Muon steps."""

from typing import Any

from torch import nn

from videogru.errors import ConfigError


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


def muon_groups(model: nn.Module, *, muon_lr: float, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for Muon: the kernels of all convolutions but the first, then those of `decay_groups`.

    The first convolution reads pixels, not features; a depthwise one is no matrix, its channels do not meet. Raises
    ConfigError where no kernel is left.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
    kernels = [m.weight for m in convolutions[1:] if m.groups == 1]
    if not kernels:
        raise ConfigError(
            "muon steps the kernels of convolutions behind the first, and this encoder has none",
            where="train.optimizer",
            hint="Use --set train.optimizer=adamw, or another encoder.",
        )
    mine = {id(kernel) for kernel in kernels}
    others = decay_groups(model, lr=lr, weight_decay=weight_decay)
    for group in others:
        group["params"] = [p for p in group["params"] if id(p) not in mine]
    kernel_group = {"params": kernels, "muon": True, "lr": muon_lr, "weight_decay": weight_decay}
    return [kernel_group, *(group for group in others if group["params"])]


def _weights(model: nn.Module) -> list[nn.Parameter]:
    layers = (nn.Linear, nn.Conv2d, nn.RNNBase, nn.RNNCellBase)
    return [
        parameter
        for module in model.modules()
        if isinstance(module, layers)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("weight")
    ]
