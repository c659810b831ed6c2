"""How far apart the steps lie, in seconds or mm, as something that the recurrent part reads."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videogru.models.serialize import valid_steps
from videogru.shapes import Gaps, Lengths


class GapEmbedding(nn.Module):
    """Gaps (B T) before each step to vectors (B T D) that are added to the steps.

    A linear map of the logarithm of the gap before a step and, unless `causal`, of the one after it; where there is
    none, at the ends of a clip, zero stands for it. That the time since the last observation is an input of its own is
    from Lipton et al. 2016 (arXiv:1606.04130) and Che et al. 2018 (GRU-D, arXiv:1606.01865, section 2), who also let
    the state decay with it, which is left out. The map starts at zero: at first nothing is added.
    """

    def __init__(self, size: int, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.linear = nn.Linear(1 if causal else 2, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, gaps: Gaps, lengths: Lengths) -> Float[Tensor, "B T D"]:
        """Vectors of the steps; those of padded steps mean nothing."""
        gaps = gaps.to(self.linear.weight.dtype)
        inside = valid_steps(lengths, gaps.shape[1]) & (gaps > 0)
        before = torch.where(inside, gaps, 1.0).log()
        parts = [before]
        if not self.causal:
            parts.append(torch.cat((before[:, 1:], torch.zeros_like(before[:, :1])), dim=1))
        added: Tensor = self.linear(torch.stack(parts, dim=-1))
        return added
