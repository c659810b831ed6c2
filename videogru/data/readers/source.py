"""What every reader offers, whatever it reads."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.kinds import Kind, Unit


@runtime_checkable
class FrameSource(Protocol):
    """One opened source: where its steps lie, and a way to read some of them. Use it in a `with` block.

    kind: video, volume or image; positions: (N,) float64, strictly increasing: the start of each frame in seconds, the
    center of each slice in mm, or 0 for a still; extent: (start, end) in the same unit, end being the end of the last
    step; pixel_aspect: height of a pixel over its width; details: what `videogru data info` shows (plain values).
    """

    path: Path
    kind: Kind
    unit: Unit
    positions: NDArray[np.float64]
    extent: tuple[float, float]
    pixel_aspect: float
    details: dict[str, object]

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The steps at increasing `indices` (of `positions`) as (T C H W), uint8 in 0..255 or float32 in 0..1.

        Raises SourceError where the steps cannot be read as promised.
        """
        ...

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        ...

    def __enter__(self) -> "FrameSource": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
