"""What every reader of scans returns."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True)
class Scan:
    """Voxels of one 3-D scan as stored, and where they lie in the patient.

    voxels: (X Y Z) integers or floats; value = voxel * slope + intercept; affine: (4, 4) float64, voxel indices to mm
    in RAS+ (nibabel's convention); details: plain values that `videogru data info` shows.
    """

    voxels: NDArray[Any]
    slope: float
    intercept: float
    affine: NDArray[np.float64]
    details: dict[str, object]
