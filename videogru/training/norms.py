"""BatchNorm over the clips of all processes.

torch's own SyncBatchNorm takes GPUs only. This one is made of plain operations: CPUs and GPUs run the same code.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose mean and variance are those of the batch over all processes; in eval mode plain BatchNorm2d."""

    counted = True

    def forward(self, input: Tensor) -> Tensor:
        """(N C H W) of the same dtype; each process may have another N."""
        if not self.training:
            plain: Tensor = super().forward(input)
            return plain
        maps, weight = input.float(), float(self.counted)
        count = maps.new_full((1,), weight * maps.numel() / maps.shape[1])
        sums = _Summed.apply(torch.cat([weight * maps.sum(dim=(0, 2, 3)), count]))
        count = sums[-1:].detach()
        mean = sums[:-1] / count
        centered = maps - mean[:, None, None]
        # Centered first: a difference of large squares would lose what matters.
        variance = _Summed.apply(weight * centered.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        result: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return result.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            # Gradient checkpointing takes it away for the second time.
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)


class _Summed(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def share_norms(model: nn.Module) -> None:
    """Make every BatchNorm2d of `model` a SharedBatchNorm2d, with its tensors, their names and its settings."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # The same layer with another forward, as torch's lazy layers become the real ones.
            module.__class__ = SharedBatchNorm2d


def count_maps(model: nn.Module, *, counted: bool) -> None:
    """Whether this process's maps enter the statistics from now on: not those of a stand-in where nothing was read."""
    for module in model.modules():
        if isinstance(module, SharedBatchNorm2d):
            module.counted = counted
