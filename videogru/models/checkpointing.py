"""Gradient checkpointing: what the gradient needs is computed a second time in place of being kept.

Chen et al. 2016 (arXiv:1604.06174, section 3): of each segment of the computation only the input is kept. Gradients
are the same; the price is the time of one more forward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def by_stage(layers: nn.Module, frames: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
    """`layers(frames)`, of which only the maps between `stages` are kept for the gradient.

    The second time, dropout draws the same numbers, and the running statistics of BatchNorm stay as they are.
    """
    maps: Tensor = frames
    for stage in stages(layers):
        maps = checkpoint(stage, maps, use_reentrant=False, context_fn=partial(_contexts, stage))
    return maps


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _Frozen([module for module in stage.modules() if isinstance(module, _BatchNorm)])


def stages(layers: nn.Module) -> list[nn.Sequential]:
    """The children in order, plain Sequentials opened; each joins those before it unless it has matrices or kernels."""
    groups: list[list[nn.Module]] = []
    for child in _opened(layers):
        if not groups or any(parameter.ndim > 1 for parameter in child.parameters()):
            groups.append([])
        groups[-1].append(child)
    return [nn.Sequential(*group) for group in groups]


def in_chunks(layer: nn.Module, steps: Float[Tensor, "B S *D"], size: int) -> Float[Tensor, "B S *H"]:
    """The outputs of a recurrent layer with torch's interface, batch first; of its states one every `size` is kept.

    The layer must draw no random numbers.
    """
    state = None
    outputs = []
    for chunk in steps.split(size, dim=1):
        output, state = checkpoint(layer, chunk, state, use_reentrant=False, preserve_rng_state=False)
        outputs.append(output)
    if isinstance(layer, nn.RNNBase):
        # In memory step by step, as the layer gives them: dropout draws its numbers in the order of memory.
        return torch.cat([output.transpose(0, 1) for output in outputs]).transpose(0, 1)
    return torch.cat(outputs, dim=1)


def _opened(layers: nn.Module) -> Iterator[nn.Module]:
    for child in layers.children():
        # Subclasses, such as torchvision's blocks, are one stage each.
        if type(child) is nn.Sequential:
            yield from _opened(child)
        else:
            yield child


class _Frozen(AbstractContextManager[None]):
    """BatchNorm layers use the batch's statistics, as in training, but leave the running ones and the count alone.

    By a momentum of zero, as without running statistics they would keep other tensors for the gradient than before.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self.norms = norms
        self.before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
