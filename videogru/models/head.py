"""From the states of all steps to one vector per clip, and to logits."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from videogru.config import ModelConfig
from videogru.models.attention import MultiheadPooling
from videogru.models.serialize import valid_steps
from videogru.models.streaming import LOWEST, RunningMean, Slot, State
from videogru.shapes import Lengths, Logits


def pool(
    outputs: Float[Tensor, "B S F"],
    lengths: Lengths,
    mode: str,
    *,
    bidirectional: bool = False,
    query: Float[Tensor, " F"] | None = None,
) -> Float[Tensor, "B F"]:
    """One vector per clip from its first `lengths` (B,) steps; padded steps never count.

    mean, max: over steps. last: the state after the whole clip, which for the backward half of a bidirectional part is
    the one at step 0. attention: the mean weighted by softmax(outputs . query / sqrt(F)), with a learned query
    (Vaswani et al. 2017, section 3.2.1, with one query and keys = values = outputs). Raises ValueError on another mode;
    multihead has parameters and is a layer, MultiheadPooling.
    """
    if mode == "last":
        place = (lengths - 1).view(-1, 1, 1).expand(-1, 1, outputs.shape[-1])
        final = outputs.gather(1, place).squeeze(1)
        if not bidirectional:
            return final
        half = outputs.shape[-1] // 2
        return torch.cat((final[:, :half], outputs[:, 0, half:]), dim=-1)
    padded = ~valid_steps(lengths, outputs.shape[1]).unsqueeze(-1)
    if mode == "mean":
        return outputs.masked_fill(padded, 0.0).sum(1) / lengths.unsqueeze(-1)
    if mode == "max":
        return outputs.masked_fill(padded, -math.inf).amax(1)
    if mode == "attention" and query is not None:
        scores = (outputs * query).sum(-1, keepdim=True) / math.sqrt(outputs.shape[-1])
        share = scores.masked_fill(padded, -math.inf).softmax(1)
        return (outputs.masked_fill(padded, 0.0) * share).sum(1)
    raise ValueError(f"pooling is last, mean, max or attention (with a query), not {mode!r}")


class Head(nn.Module):
    """Pool, drop out, and one linear layer: states (B S F) and lengths (B,) -> logits (B K).

    The query of attention starts at zero, where attention is the mean.
    """

    def __init__(self, config: ModelConfig, in_size: int, num_classes: int) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.bidirectional = config.cell != "none" and config.temporal == "bi"
        self.query = nn.Parameter(torch.zeros(in_size)) if config.pooling == "attention" else None
        self.multihead = MultiheadPooling(in_size, config.attention_heads) if config.pooling == "multihead" else None
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(in_size, num_classes)

    def forward(self, outputs: Float[Tensor, "B S F"], lengths: Lengths) -> Logits:
        """Unnormalized scores of the classes."""
        if self.multihead is not None:
            pooled = self.multihead(outputs, lengths)
        else:
            pooled = pool(outputs, lengths, self.pooling, bidirectional=self.bidirectional, query=self.query)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits

    def slots(self) -> dict[str, Slot]:
        """What a stream keeps of all its states: what `pooled` needs of them, whose size does not grow."""
        if self.multihead is not None:
            return RunningMean.slots(*self.multihead.queries.shape)
        size = self.linear.in_features
        if self.pooling in ("last", "max"):
            return {self.pooling: Slot((size,), fill=LOWEST if self.pooling == "max" else 0.0)}
        return RunningMean.slots(1, size)

    def absorb(self, outputs: Float[Tensor, "B N F"], there: Bool[Tensor, "B N"], state: State) -> State:
        """The state after N more states of each stream; only those that are `there` count, the last always is."""
        if self.pooling == "last":
            return {"last": outputs[:, -1].clone()}
        if self.pooling == "max":
            highest = outputs.masked_fill(~there.unsqueeze(-1), LOWEST).amax(1)
            return {"max": torch.maximum(state["max"], highest)}
        if self.multihead is not None:
            return RunningMean.absorb(*self.multihead.of_steps(outputs), there, state)
        if self.query is None:
            scores = torch.zeros_like(outputs[..., :1])
        else:
            scores = (outputs * self.query).sum(-1, keepdim=True) / math.sqrt(outputs.shape[-1])
        return RunningMean.absorb(outputs.unsqueeze(2), scores, there, state)

    def answer(self, state: State) -> Logits:
        """The logits of `forward` for all states that went into `state`."""
        if self.pooling in ("last", "max"):
            pooled = state[self.pooling]
        else:
            pooled = state["mean"].flatten(1)
            pooled = pooled if self.multihead is None else self.multihead.project(pooled)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits
