"""Time stamps of decoded frames, in ticks, and what becomes of those that are missing or the same."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def increasing(stamps: list[int | None]) -> bool:
    """Whether none is missing and each is later than the one before."""
    known = [pts for pts in stamps if pts is not None]
    return len(known) == len(stamps) and all(a < b for a, b in pairwise(known))


def spread(stamps: list[int | None]) -> NDArray[np.float64] | None:
    """Increasing places in ticks where stamps at most repeat, as 0 0 2 4 4 4 -> 0 1 2 4 4.67 5.33; None elsewhere."""
    known = np.array([pts for pts in stamps if pts is not None], np.int64)
    if len(known) != len(stamps) or (np.diff(known) < 0).any():
        return None
    starts, group, counts = np.unique(known, return_inverse=True, return_counts=True)
    if len(starts) == 1 < len(known):
        return None
    gaps = np.append(np.diff(starts), np.median(np.diff(starts)) if len(starts) > 1 else 0)
    nth = np.arange(len(known)) - (np.cumsum(counts) - counts)[group]
    return np.asarray(known + nth * gaps[group] / counts[group])
