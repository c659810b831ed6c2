"""The two records that flow from readers to models; both check themselves when they are made."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float

from videogru.kinds import Unit
from videogru.shapes import BatchFrames, ClipFrames, Gaps, Labels, Lengths, Positions


@dataclass(frozen=True, slots=True)
class FrameSequence:
    """A clip: the chosen steps of one source.

    frames: (T C H W), uint8 in 0..255 or float32 in 0..1; positions: (T,) float64, strictly increasing, in `unit`.
    """

    frames: ClipFrames
    positions: Positions
    unit: Unit

    def __post_init__(self) -> None:
        if len(self.frames) == 0:
            raise ValueError("a FrameSequence has at least one step")
        if len(self.frames) != len(self.positions):
            raise ValueError(f"{len(self.frames)} frames but {len(self.positions)} positions")
        if len(self.positions) > 1 and not bool((self.positions.diff() > 0).all()):
            raise ValueError("positions must increase strictly")

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        t, c, h, w = self.frames.shape
        first, last = float(self.positions[0]), float(self.positions[-1])
        return f"FrameSequence(T={t} C={c} H={h} W={w} {self.frames.dtype}, {first:.3f}..{last:.3f} {self.unit})"

    def with_frames(self, frames: torch.Tensor) -> "FrameSequence":
        """The same positions with other pixels."""
        return replace(self, frames=frames)


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Clips padded at the end to the longest: frames (B T C H W), lengths (B,) valid steps, 1 <= length <= T.

    indices: (B,) int64, the manifest row of each clip; labels: (B,) int64 or None where unknown. For clips mixed in
    training, others: (B,) int64, labels of what was mixed in; shares: (B,) float32, what is left of the first label.
    gaps: (B T) float32, how far a step lies from the one before, in seconds or mm; 0 at first steps and padding.
    """

    frames: BatchFrames
    lengths: Lengths
    indices: Lengths
    labels: Labels | None = None
    others: Labels | None = None
    shares: Float[torch.Tensor, " B"] | None = None
    gaps: Gaps | None = None

    def __post_init__(self) -> None:
        batch, steps = self.frames.shape[:2]
        if not len(self.lengths) == len(self.indices) == batch:
            raise ValueError(f"{batch} clips, {len(self.lengths)} lengths, {len(self.indices)} indices")
        if self.labels is not None and len(self.labels) != batch:
            raise ValueError(f"{batch} clips but {len(self.labels)} labels")
        if (self.others is None) != (self.shares is None) or (self.others is not None and self.labels is None):
            raise ValueError("mixed clips have labels, others and shares")
        if self.gaps is not None and self.gaps.shape != (batch, steps):
            raise ValueError(f"{batch} clips of {steps} steps, but gaps {tuple(self.gaps.shape)}")
        if (
            self.lengths.device.type == "cpu"
            and batch
            and not 1 <= int(self.lengths.min()) <= int(self.lengths.max()) <= steps
        ):
            raise ValueError(f"lengths must lie in 1..{steps}, got {self.lengths.tolist()}")

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        b, t, c, h, w = self.frames.shape
        return f"SequenceBatch(B={b} T={t} C={c} H={h} W={w} {self.frames.dtype}, labels={self.labels is not None})"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SequenceBatch":
        """The batch on another device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        optional = (self.labels, self.others, self.shares, self.gaps)
        moved = (None if tensor is None else move(tensor) for tensor in optional)
        return SequenceBatch(move(self.frames), move(self.lengths), move(self.indices), *moved)
