"""Which steps of a source make a clip: pure functions on positions, before anything is decoded.

A source has positions p0 < p1 < ... and an extent [start, end). Either it is cut into `num_frames` equal segments and
one time is taken in each, at one place of all (`uniform`) or at drawn ones (`random`); or times lie a fixed stride
apart (`dense`); or all steps are taken (`every`). The step that belongs to a time is

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
    *,
    positions: NDArray[np.float64],
    extent: tuple[float, float],
    num_frames: int,
    place: float = 0.5,
    rule: Rule = "showing",
) -> NDArray[np.int64]:
    """Increasing, unique indices of the steps at one place of each segment, its center; at most `num_frames`.

    positions: (N,), strictly increasing; extent: (start, end) in the same unit; place: in [0, 1), of each segment.
    Several clips of one source take several places (TSN: Wang et al. 2016, arXiv:1608.00859, section 3.1):

      segments    |-------------|-------------|-------------|
      place 0.25     ^             ^             ^
      place 0.75              ^             ^             ^

    Raises ValueError as `every` does, or on a bad place.
    """
    if not 0 <= place < 1:
        raise ValueError(f"place must lie in [0, 1), got {place:g}")
    return _pick(positions, extent, np.full(_counted(num_frames), place), rule)


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


def dense(
    *,
    positions: NDArray[np.float64],
    extent: tuple[float, float],
    num_frames: int,
    stride: float,
    place: float,
    rule: Rule = "showing",
) -> NDArray[np.int64]:
    """Increasing, unique indices of steps `stride` apart; place 0: from the start on, 1: as late as the clip fits.

    As video nets are usually trained (SlowFast: Feichtenhofer et al. 2019, arXiv:1812.03982, section 4), but with a
    stride in the unit of `positions`, so that clips of 25 and of 60 frames a second look alike:

      extent      start                                              end
      place 0     |---^---|---^---|---^---|
      place 0.5                 |---^---|---^---|---^---|
      place 1                                   |---^---|---^---|---^---|

    Each time is the center of its stride. An extent shorter than num_frames strides gives the times that lie in it.
    Raises ValueError as `every` does, or on a bad stride or place.
    """
    if not (np.isfinite(stride) and stride > 0):
        raise ValueError(f"stride must be above 0, got {stride:g}")
    if not 0 <= place <= 1:
        raise ValueError(f"place must lie in [0, 1], got {place:g}")
    inside = every(positions=positions, extent=extent, rule=rule)
    start, end = extent
    begin = start + place * max(0.0, end - start - _counted(num_frames) * stride)
    times = begin + (np.arange(num_frames, dtype=np.float64) + 0.5) * stride
    times = times[times < end] if times[0] < end else np.array([(start + end) / 2], dtype=np.float64)
    return _steps_at(times, positions, inside, rule)


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
    return _steps_at(times, positions, inside, rule)


def _steps_at(
    times: NDArray[np.float64], positions: NDArray[np.float64], inside: NDArray[np.int64], rule: Rule
) -> NDArray[np.int64]:
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
