"""Which steps of a source make a clip: pure functions on positions, before anything is decoded.

A source has positions p0 < p1 < ... and an extent [start, end). The extent is cut into `num_frames` equal segments and
one time is taken in each: its center (`uniform`) or a drawn place (`random`). The step that belongs to a time is

  rule "showing"  the last one that began (video: a frame shows until the next begins)
  rule "nearest"  the one whose center is nearest (volume: a slice has a thickness around its center)

  showing, num_frames=3    start                                    end
  positions                p0    p1    p2    p3    p4    p5    p6    |
  segments                 |-------------|-------------|-------------|
  centers                         ^             ^             ^
  indices                         1             3             5

Two times that fall on one step give it once: a clip is shorter than asked rather than repeating itself. Where the
extent has at most `num_frames` steps, all of them are returned.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rule = Literal["showing", "nearest"]


def uniform(
    *, positions: NDArray[np.float64], extent: tuple[float, float], num_frames: int, rule: Rule = "showing"
) -> NDArray[np.int64]:
    """Increasing, unique indices of the steps at the segments' centers; at most `num_frames`.

    positions: (N,), strictly increasing; extent: (start, end) in the same unit. Raises ValueError as `every` does.
    """
    return _pick(positions, extent, np.full(_counted(num_frames), 0.5), rule)


def random(
    *,
    positions: NDArray[np.float64],
    extent: tuple[float, float],
    num_frames: int,
    draws: NDArray[np.float64],
    rule: Rule = "showing",
) -> NDArray[np.int64]:
    """As `uniform`, with the time in segment k at the fraction draws[k] of it; draws: (num_frames,) in [0, 1).

    The caller draws, so that a clip is a function of its seed. Raises ValueError as `every` does, or on bad draws.
    """
    if draws.shape != (_counted(num_frames),):
        raise ValueError(f"{num_frames} frames want draws of shape ({num_frames},), got {draws.shape}")
    if not bool(np.all((draws >= 0) & (draws < 1))):
        raise ValueError("draws must lie in [0, 1)")
    return _pick(positions, extent, draws, rule)


def every(*, positions: NDArray[np.float64], extent: tuple[float, float], rule: Rule = "showing") -> NDArray[np.int64]:
    """All indices in the extent: frames that show at some time of [start, end), or slices with their center in it.

    showing, the extent begins inside p1 and ends inside p3:

      positions   p0    p1    p2    p3    p4
      extent               [==========)
      indices           1     2     3

    Raises ValueError where there are no positions, they do not increase, the extent is empty or holds no step.
    """
    start, end = extent
    if positions.ndim != 1 or len(positions) == 0:
        raise ValueError(f"expected at least one position in one row, got shape {positions.shape}")
    if not bool(np.all(np.isfinite(positions))) or not bool(np.all(np.diff(positions) > 0)):
        raise ValueError("positions must be finite and increase strictly")
    if not (np.isfinite(start) and np.isfinite(end) and start < end):
        raise ValueError(f"empty extent {start:g}..{end:g}")
    first = int(np.searchsorted(positions, start, side="left"))
    if rule == "showing" and (first == len(positions) or positions[first] > start):
        first = max(first - 1, 0)
    stop = int(np.searchsorted(positions, end, side="left"))
    if stop <= first:
        raise ValueError(f"no step in {start:g}..{end:g}: they lie at {positions[0]:g}..{positions[-1]:g}")
    return np.arange(first, stop, dtype=np.int64)


def _pick(
    positions: NDArray[np.float64], extent: tuple[float, float], fractions: NDArray[np.float64], rule: Rule
) -> NDArray[np.int64]:
    inside = every(positions=positions, extent=extent, rule=rule)
    count = len(fractions)
    if len(inside) <= count:
        return inside
    start, end = extent
    times = start + (np.arange(count) + fractions) * ((end - start) / count)
    if rule == "showing":
        steps = np.searchsorted(positions, times, side="right") - 1
    else:
        # A time halfway between two centers belongs to the later one, as in "showing".
        steps = np.searchsorted((positions[1:] + positions[:-1]) / 2, times, side="right")
    return np.unique(np.clip(steps, inside[0], inside[-1])).astype(np.int64)


def _counted(num_frames: int) -> int:
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return num_frames
