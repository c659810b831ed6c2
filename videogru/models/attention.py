"""Attention over steps: a window around each step before the recurrent part, and several heads as a pooling."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from videogru.models.serialize import valid_steps
from videogru.models.streaming import Slot, State
from videogru.shapes import Lengths, Steps

_SHORTEST_BLOCK = 16  # queries that share one matrix product; one by one would be slower


class LocalAttention(nn.Module):
    """Steps (B S D), of which the first `lengths` (B,) are valid, to (B S D); zeros at padded steps.

    Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2) in which a step sees the valid
    steps at most `radius` away (Longformer: Beltagy et al. 2020, arXiv:2004.05150, section 3.1, sliding window), of
    them only itself and those before it where `causal`. Each head adds a learned bias per relative position to its
    scores (T5: Raffel et al. 2020, arXiv:1910.10683, section 2.1, without its buckets; the idea: Shaw et al. 2018,
    arXiv:1803.02155, section 3.2). LayerNorm before, the steps themselves added after (pre-LN: Xiong et al. 2020,
    arXiv:2002.04745). A head has D / heads features, rounded up. Time and memory grow with S * radius. Runs in float32
    at least, also under autocast.

    The output projection starts at zero, so that at first the steps pass unchanged and the rest of the net trains as
    without this layer (the last scale of a residual branch at zero: Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    """

    def __init__(self, size: int, radius: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if min(size, radius, heads) < 1:
            raise ValueError(f"size, radius and heads are at least 1, not {size}, {radius} and {heads}")
        self.radius = radius
        self.ahead = 0 if causal else radius
        self.heads = heads
        inner = heads * math.ceil(size / heads)
        self.inner = inner
        self.norm = nn.LayerNorm(size)
        self.query = nn.Linear(size, inner)
        # No bias here: it would move all scores of a query alike, and a mean of values by a constant.
        self.key = nn.Linear(size, inner, bias=False)
        self.value = nn.Linear(size, inner, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(heads, radius + 1 + self.ahead))  # farthest past step first
        self.project = nn.Linear(inner, size)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight)
        for zero in (self.query.bias, self.project.weight, self.project.bias):
            nn.init.zeros_(zero)

    def forward(self, steps: Steps, lengths: Lengths) -> Steps:
        """The steps, each with what its neighbors add."""
        with torch.autocast(steps.device.type, enabled=False):
            if steps.dtype in (torch.bfloat16, torch.float16):
                steps = steps.float()
            valid = valid_steps(lengths, steps.shape[1])
            padded = ~valid.unsqueeze(-1)
            steps = steps.masked_fill(padded, 0.0)  # whatever padding holds, nan too, stops here
            added = self.project(self._attend(self.norm(steps), valid))
            outputs: Tensor = (steps + added).masked_fill(padded, 0.0)
            return outputs

    def slots(self) -> dict[str, Slot]:
        """What a stream keeps: keys and values of the steps before the next one."""
        return {name: Slot((self.radius, self.inner)) for name in ("keys", "values")}

    def step(self, steps: Steps, state: State, before: Int64[Tensor, " B"]) -> tuple[Steps, State]:
        """N more steps (B N D), each with what those before it add, and what to keep; only where `causal`.

        before: (B,) steps that the streams had. Place w of the N + radius keys is w - radius - q steps from query q.
        """
        with torch.autocast(steps.device.type, enabled=False):
            if steps.dtype in (torch.bfloat16, torch.float16):
                steps = steps.float()
            normed, N = self.norm(steps), steps.shape[1]
            keys = torch.cat((state["keys"], self.key(normed)), dim=1)
            values = torch.cat((state["values"], self.value(normed)), dim=1)
            places = torch.arange(keys.shape[1], device=steps.device)
            offsets = places - torch.arange(N, device=steps.device).unsqueeze(1)
            near = (offsets >= 0) & (offsets <= self.radius)
            bias = self.position_bias[:, offsets.clamp(0, self.radius)]
            there = before.unsqueeze(1) + places >= self.radius

            queries, of_head = self.query(normed).unflatten(-1, (self.heads, -1)), (self.heads, -1)
            scores = torch.einsum("bqhd,bwhd->bhqw", queries, keys.unflatten(-1, of_head))
            scores = scores / math.sqrt(queries.shape[-1]) + bias
            share = scores.masked_fill(~(near & there[:, None, None, :]), -math.inf).softmax(-1)
            means = torch.einsum("bhqw,bwhd->bqhd", share, values.unflatten(-1, of_head))
            outputs: Tensor = steps + self.project(means.flatten(2))
            return outputs, {"keys": keys[:, N:], "values": values[:, N:]}

    def _attend(self, steps: Steps, valid: Bool[Tensor, "B S"]) -> Float[Tensor, "B S inner"]:
        """All heads' weighted means of values.

        Queries are cut into N blocks of Q; a block sees one window of W = radius + Q + ahead keys, cut from padded keys
        with overlaps. Place q of a block and place w of its window lie w - radius - q steps apart.
        """
        S = steps.shape[1]
        Q = max(self.radius, _SHORTEST_BLOCK)
        if not torch.compiler.is_exporting():  # a graph would keep which of the two it was
            Q = min(S, Q)
        fill = -S % Q
        queries = F.pad(self.query(steps), (0, 0, 0, fill)).unflatten(1, (-1, Q)).unflatten(-1, (self.heads, -1))
        window, around = Q + self.radius + self.ahead, (self.radius, self.ahead + fill)
        keys = F.pad(self.key(steps), (0, 0, *around)).unfold(1, window, Q).unflatten(2, (self.heads, -1))
        values = F.pad(self.value(steps), (0, 0, *around)).unfold(1, window, Q).unflatten(2, (self.heads, -1))
        seen = F.pad(valid, around).unfold(1, window, Q)

        offsets = torch.arange(window, device=steps.device) - torch.arange(Q, device=steps.device).unsqueeze(1)
        near = (offsets >= 0) & (offsets < self.position_bias.shape[1])
        bias = self.position_bias[:, offsets.clamp(0, self.position_bias.shape[1] - 1)]
        # A padded step sees itself alone: a softmax over nothing would be nan, in gradients too.
        allowed = near & (seen[:, :, None, :] | (offsets == self.radius))

        scores = torch.einsum("bnqhd,bnhdw->bnhqw", queries, keys) / math.sqrt(queries.shape[-1]) + bias
        share = scores.masked_fill(~allowed.unsqueeze(2), -math.inf).softmax(-1)
        means = torch.einsum("bnhqw,bnhdw->bnqhd", share, values)
        return means.flatten(3).flatten(1, 2)[:, :S]


class MultiheadPooling(nn.Module):
    """States (B S F) and lengths (B,) to one vector per clip (B F): attention with one learned query per head.

    Set Transformer's pooling (Lee et al. 2019, arXiv:1810.00825, section 3.2, PMA with k = 1), its attention
    alone: multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2) of a learned seed to the states.
    The seed and its linear map are one product, learned here as such: `queries`. A head has F / heads features, rounded
    up.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        if min(size, heads) < 1:
            raise ValueError(f"size and heads are at least 1, not {size} and {heads}")
        inner = heads * math.ceil(size / heads)
        self.queries = nn.Parameter(torch.empty(heads, inner // heads))
        self.key = nn.Linear(size, inner, bias=False)  # biases: see LocalAttention
        self.value = nn.Linear(size, inner, bias=False)
        self.project = nn.Linear(inner, size)
        for weight in (self.queries, self.key.weight, self.value.weight):
            nn.init.xavier_uniform_(weight)

    def forward(self, outputs: Float[Tensor, "B S F"], lengths: Lengths) -> Float[Tensor, "B F"]:
        """One vector per clip; padded steps never count."""
        padded = ~valid_steps(lengths, outputs.shape[1]).unsqueeze(-1)
        values, scores = self.of_steps(outputs.masked_fill(padded, 0.0))
        share = scores.masked_fill(padded, -math.inf).softmax(1)
        pooled: Tensor = self.project((values * share.unsqueeze(-1)).sum(1).flatten(1))
        return pooled

    def of_steps(self, states: Float[Tensor, "B S F"]) -> tuple[Float[Tensor, "B S P d"], Float[Tensor, "B S P"]]:
        """What each of the P heads would take of each step, and with what score."""
        keys, values = (linear(states).unflatten(-1, self.queries.shape) for linear in (self.key, self.value))
        return values, (keys * self.queries).sum(-1) / math.sqrt(self.queries.shape[1])
