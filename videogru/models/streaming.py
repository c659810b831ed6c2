"""What a model keeps between two frames of a stream: a few named tensors, which can be saved, sent and resumed.

Each part of the model names its tensors (`slots`) and reads one frame with them (`step`). All have the streams first:
(B ...), so that streams are split, joined and reordered by indexing every tensor alike. None grows with time.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from videogru.config import ModelConfig

State = dict[str, Tensor]


class Slot(NamedTuple):
    """One tensor of a state: its shape without the batch, what it starts with, and whether it counts (int64)."""

    shape: tuple[int, ...]
    fill: float = 0.0
    counts: bool = False

    def dtype(self, like: Tensor) -> torch.dtype:
        """Of the tensor, in a model whose parameters are as `like`."""
        return torch.int64 if self.counts else like.dtype


def what_reads_ahead(config: ModelConfig) -> str | None:
    """The setting by which an answer needs frames that a stream does not have yet; None: the model can stream.

    A model without a recurrent part may be causal whatever model.temporal says. lookahead is no obstacle: at the end of
    what was seen it does without, as at the end of a clip.
    """
    if config.frame_differences == "both":
        return "model.frame_differences=both"
    if config.temporal == "causal":
        return None
    return "model.temporal=bi" if config.cell != "none" or config.local_attention or config.use_gaps else None


def prefixed(part: str, tensors: Mapping[str, Tensor]) -> State:
    """The tensors of a part under the names that they have in the whole state."""
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def of_part(part: str, state: Mapping[str, Tensor]) -> State:
    """The tensors of one part, under its own names."""
    start = f"{part}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def fresh_state(slots: Mapping[str, Slot], batch: int, like: Tensor) -> State:
    """The state of `batch` streams that have seen nothing, on the device of `like`."""
    return {
        name: torch.full((batch, *slot.shape), slot.fill, dtype=slot.dtype(like), device=like.device)
        for name, slot in slots.items()
    }


def check_state(state: Mapping[str, Tensor], slots: Mapping[str, Slot], batch: int, like: Tensor) -> None:
    """Raises ValueError where `state` is not one of `batch` streams of this model: it may come from a file."""
    if state.keys() != slots.keys():
        strange = sorted(state.keys() ^ slots.keys())
        raise ValueError(
            f"the state is another model's: {strange[0]} is {'extra' if strange[0] in state else 'missing'}"
        )
    for name, slot in slots.items():
        tensor, shape = state[name], (batch, *slot.shape)
        if tuple(tensor.shape) != shape or tensor.dtype != slot.dtype(like):
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {slot.dtype(like)}")


class RunningMean:
    """The mean over all steps so far, of P parts (heads), each step weighted by exp(its score): a softmax that goes on.

    Kept are, per head, the highest score, the sum of weights relative to it (Milakov and Gimelshein 2018,
    arXiv:1805.02867, section 3), the mean, and what was rounded off it (Kahan 1965, Communications of the ACM 8(1)):
    nothing overflows, and after 100,000 steps the mean has as many digits as after ten.
    """

    @staticmethod
    def slots(heads: int, size: int) -> dict[str, Slot]:
        """`size` features per head."""
        return {
            "peak": Slot((heads,), fill=LOWEST),
            "total": Slot((heads,)),
            **{name: Slot((heads, size)) for name in ("mean", "rest")},
        }

    @staticmethod
    def absorb(
        values: Float[Tensor, "B N P d"], scores: Float[Tensor, "B N P"], there: Bool[Tensor, "B N"], state: State
    ) -> State:
        """The state after N more steps, of which only those that are `there` count."""
        there = there.unsqueeze(-1)
        peak = torch.maximum(state["peak"], scores.masked_fill(~there, LOWEST).amax(1))
        shares = (scores - peak.unsqueeze(1)).exp().masked_fill(~there, 0.0)
        total = state["total"] * (state["peak"] - peak).exp() + shares.sum(1)
        # The first steps may all be missing; then the mean stays zero.
        parts = shares / total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(1)
        mean = state["mean"]
        change = (parts.unsqueeze(-1) * (values - mean.unsqueeze(1))).sum(1) - state["rest"]
        moved = mean + change
        return {"peak": peak, "total": total, "mean": moved, "rest": (moved - mean) - change}


LOWEST = -1e30  # below any score; finite, so that differences of two are numbers
