"""Muon for convolutions and gates, AdamW for everything else, in one optimizer with one saved state."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: steep at zero, singular values end in 0.7..1.2
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Steps of orthogonalized momentum for groups with `muon: True`, AdamW's for the others.

    The momentum of a weight, seen as a matrix (outputs x all else), is replaced by the nearest orthogonal one (Jordan
    et al. 2024, https://kellerjordan.github.io/posts/muon; for convolutions: Jordan 2024, arXiv:2404.00498, repository
    airbench). torch.optim.Muon takes matrices only. Groups: params, muon, lr, weight_decay (decoupled), gates: a weight
    is so many matrices, one below the other (3 in a GRU's).
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"muon": False, "gates": 1, "lr": 1e-3, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in parameters:
                    self._orthogonal_step(parameter, group["gates"], group["lr"], group["weight_decay"])
            elif parameters:
                self._adamw_step(parameters, group["lr"], group["weight_decay"])
        return loss

    def _orthogonal_step(self, parameter: Tensor, gates: int, lr: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        matrices = gradient.lerp(momentum, _MOMENTUM).flatten(1).chunk(gates)
        # Tall matrices have longer orthogonal columns to make up for.
        scale = math.sqrt(max(1.0, matrices[0].shape[0] / matrices[0].shape[1]))
        parameter.mul_(1 - lr * weight_decay)
        direction = torch.cat([orthogonalize(matrix) for matrix in matrices])
        parameter.add_(direction.view(parameter.shape), alpha=-lr * scale)

    def _adamw_step(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix (m n) with its singular values drawn near one, by five Newton-Schulz steps in bfloat16; same dtype."""
    linear, cubic, quintic = _POLYNOMIAL
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.T if tall else x).to(matrix.dtype)
