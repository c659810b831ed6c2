"""Each step's output sees a few further steps, and no more: the delay of a causal model, bounded."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from videogru.models.streaming import Slot, State


class Lookahead(nn.Module):
    """States (B S F), zeros at padded steps, to the same, each mixed with the `ahead` states after it.

    The row convolution of Deep Speech 2 (Amodei et al. 2016, arXiv:1512.02595, section 3.3): feature f of step t gets
    sum over j = 0..ahead of W[j, f] * h[t + j, f], where what lies beyond the clip is zero:

        ahead=2    states    h0  h1  h2  h3 | 0   0
                   output 1      [---------]
                   output 3              [--------]

    It starts as the identity: W[0] = 1, the others 0. Runs in float32 at least, also under autocast.
    """

    def __init__(self, size: int, ahead: int) -> None:
        super().__init__()
        if min(size, ahead) < 1:
            raise ValueError(f"size and ahead are at least 1, not {size} and {ahead}")
        self.size, self.ahead = size, ahead
        weight = torch.zeros(ahead + 1, size)
        weight[0] = 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, states: Float[Tensor, "B S F"]) -> Float[Tensor, "B S F"]:
        """The mixed states."""
        with torch.autocast(states.device.type, enabled=False):
            if states.dtype in (torch.bfloat16, torch.float16):
                states = states.float()
            padded = F.pad(states.transpose(1, 2), (0, self.ahead))
            mixed = F.conv1d(padded, self.weight.t().unsqueeze(1), groups=self.size)
            return mixed.transpose(1, 2)

    def slots(self) -> dict[str, Slot]:
        """What a stream keeps: the states that have not seen all of their further steps."""
        return {"states": Slot((self.ahead, self.size))}

    def step(
        self, states: Float[Tensor, "B N F"], state: State, before: Int64[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B M F"], Bool[Tensor, "B M"], State]:
        """After N more states: outputs of the last M = ahead + N steps, which of them exist, and what to keep.

        The first N outputs are final; the others will change, and are as if the clip ended here. before: (B,) states
        that the streams had given.
        """
        known = torch.cat((state["states"], states), dim=1)
        places = torch.arange(known.shape[1], device=known.device)
        there = before.unsqueeze(1) + places >= self.ahead
        return self(known), there, {"states": known[:, states.shape[1] :]}
