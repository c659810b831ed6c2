"""Percentiles of stored numbers, without a float64 copy where counting will do."""

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

_CHUNK = 2**18


def finite_percentiles(
    stored: Shaped[np.ndarray, "..."], low: float, high: float, *, slope: float, intercept: float
) -> tuple[float, float] | None:
    """The `low` and `high` percentile (0..100) of the finite values of stored * slope + intercept; None without any.

    Linear between neighbors, as np.percentile. Integers of 8 or 16 bits are counted, others are sorted as float64.
    """
    # In the order of memory: neighbors along another axis lie a page apart.
    flat = stored.ravel(order="K")
    if flat.dtype.kind in "iub" and flat.dtype.itemsize <= 2:
        if not len(flat):
            return None
        ranks = (low, high) if slope >= 0 else (100 - low, 100 - high)
        counts, least = _counts(flat)
        first, last = (_counted_percentile(counts, least, rank) * slope + intercept for rank in ranks)
        return first, last
    values = flat.astype(np.float64)
    if flat.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not len(values):
        return None
    if (slope, intercept) != (1.0, 0.0):
        values = values * slope + intercept
    first, last = np.percentile(values, [low, high])
    return float(first), float(last)


def _counts(flat: NDArray[np.generic]) -> tuple[NDArray[np.int64], int]:
    """How many numbers are at most 0, 1, 2, ... above the least that their type holds, and that least."""
    native = flat.astype(flat.dtype.newbyteorder("="), copy=False)
    bits = 8 * native.dtype.itemsize
    signed = native.dtype.kind == "i"
    unsigned = native.view(f"u{native.dtype.itemsize}")
    counts = np.zeros(1 << bits, np.int64)
    for start in range(0, len(unsigned), _CHUNK):  # which bincount turns into int64
        counts += np.bincount(unsigned[start : start + _CHUNK], minlength=1 << bits)
    # The upper half of the unsigned numbers are the negative ones.
    return np.cumsum(np.roll(counts, 1 << (bits - 1)) if signed else counts), -(1 << (bits - 1)) if signed else 0


def _counted_percentile(cumulated: NDArray[np.int64], least: int, rank: float) -> float:
    place = (int(cumulated[-1]) - 1) * rank / 100
    below = int(place)
    lower, upper = np.searchsorted(cumulated, [below, min(below + 1, int(cumulated[-1]) - 1)], side="right") + least
    return float(lower) + (float(upper) - float(lower)) * (place - below)
