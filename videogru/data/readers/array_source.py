"""One row of an array-backed dataset as a source."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.readers.volume.volume import chosen_axis, to_unit_range
from videogru.kinds import Kind, Unit


class ArraySource:
    """One row of an array-backed corpus (T C H W) as a source; a volume's slices count as 1 mm apart."""

    def __init__(self, array: NDArray[np.uint8], path: Path, kind: Kind, data: DataConfig) -> None:
        self.path, self.kind, self._array, self._data = path, kind, array, data
        volume = kind == "volume"
        self.unit: Unit = "mm" if volume else "index"
        self.positions = np.arange(len(array), dtype=np.float64)
        self.extent = (-0.5, len(array) - 0.5) if volume else (0.0, float(len(array)))
        self.pixel_aspect = 1.0
        self.details: dict[str, object] = {"shape": list(array.shape)}
        if volume:
            self.details["axis"] = chosen_axis(data.axis)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The steps at `indices`; the intensity window of a volume sees all of it, as it does for a file."""
        chosen = list(indices)
        if self.kind == "volume":
            return torch.from_numpy(to_unit_range(self._array, self._data)[chosen])
        return torch.from_numpy(self._array[chosen])

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> "ArraySource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
