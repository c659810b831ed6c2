"""From an opened source to a clip: which steps are read."""

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.clips import sampling
from videogru.data.readers.source import FrameSource
from videogru.errors import SourceError
from videogru.sequence import FrameSequence


def read_clip(
    source: FrameSource,
    *,
    data: DataConfig,
    draws: NDArray[np.float64] | None = None,
    window: tuple[float, float] | None = None,
) -> FrameSequence:
    """A clip of a source by `data.sampling`, at drawn places in training, else in the middle.

    draws: (num_frames + 1,) in [0, 1), one per segment and one that shifts the window, or None for the middle. window:
    [start, end) in seconds on the video's own time line, on which its first frame lies at `source.positions[0]`
    (mostly, but not always, 0); what reaches beyond the video is cut off. Raises SourceError on an empty window, or
    where the steps cannot be read.
    """
    extent = _extent(source, data, window, 0.0 if draws is None else 2 * float(draws[-1]) - 1)
    if draws is None:
        return _read(source, [_steps(source, extent, data, 0.5)], data.slab)[0]
    if data.sampling == "random":
        indices = sampling.random(
            positions=source.positions,
            extent=extent,
            num_frames=data.num_frames,
            draws=draws[:-1],
            rule=_rule(source),
        )
    else:
        indices = _steps(source, extent, data, float(draws[0]) if data.sampling == "dense" else 0.5)
    return _read(source, [indices], data.slab)[0]


def read_clips(
    source: FrameSource, *, data: DataConfig, num_clips: int, window: tuple[float, float] | None = None
) -> list[FrameSequence]:
    """`num_clips` clips spread over a source, decoded in one pass; as `read_clip` without draws where there is one.

    Segments are read at num_clips places of each; dense clips start at equal distances, from the start to
    where the last just fits (Feichtenhofer et al. 2019, arXiv:1812.03982, section 4).
    """
    extent = _extent(source, data, window, 0.0)
    if num_clips == 1:
        places = [0.5]
    elif data.sampling == "dense":
        places = [clip / (num_clips - 1) for clip in range(num_clips)]
    else:
        places = [(clip + 0.5) / num_clips for clip in range(num_clips)]
    return _read(source, [_steps(source, extent, data, place) for place in places], data.slab)


def _extent(
    source: FrameSource, data: DataConfig, window: tuple[float, float] | None, shift: float
) -> tuple[float, float]:
    """What is sampled from: the source, or a window of it with its context; shift: -1..1 of augment.shift_seconds."""
    if window is None:
        return source.extent
    if source.unit != "seconds":
        raise SourceError(
            f"start_seconds and end_seconds are for videos, not for a {source.kind}",
            where=source.path,
            hint="Leave the two columns empty.",
        )
    first, last = source.extent
    start, end = max(window[0], first), min(window[1], last)
    if not start < end:
        raise SourceError(
            f"nothing lies between {window[0]:g} and {window[1]:g} seconds",
            where=source.path,
            hint=f"The video shows from {first:g} to {last:g} seconds.",
        )
    # Kept inside: a shift must not shorten the window.
    by = min(max(shift * data.augment.shift_seconds, first - start), last - end)
    if not by and not data.context_seconds:
        return start, end
    # To the nanosecond: 0.56 - 0.08 is a hair above 0.48, where the next frame begins.
    start, end = round(start + by - data.context_seconds, 9), round(end + by + data.context_seconds, 9)
    return max(first, start), min(last, end)


def _steps(source: FrameSource, extent: tuple[float, float], data: DataConfig, place: float) -> NDArray[np.int64]:
    positions, rule, count = source.positions, _rule(source), data.num_frames
    if data.sampling == "all":
        return sampling.every(positions=positions, extent=extent, rule=rule)
    if data.sampling == "dense":
        stride = data.stride_seconds
        return sampling.dense(
            positions=positions, extent=extent, num_frames=count, stride=stride, place=place, rule=rule
        )
    return sampling.uniform(positions=positions, extent=extent, num_frames=count, place=place, rule=rule)


def _rule(source: FrameSource) -> sampling.Rule:
    return "showing" if source.unit == "seconds" else "nearest"


def _read(source: FrameSource, clips: list[NDArray[np.int64]], slab: int) -> list[FrameSequence]:
    """The clips at these indices; what several share is decoded once.

    slab: so many neighboring slices become the channels of a step; beyond the ends, the last slice stands again.

        slices     s0 s1 s2 s3 s4
        slab=3     (s0 s0 s1) (s1 s2 s3) (s3 s4 s4)     of the indices 0, 2, 4
    """
    wanted = np.unique(np.concatenate(clips))
    # Before the read, which may correct a broken index.
    positions = torch.from_numpy(source.positions[wanted])
    if slab == 1:
        frames = source.read([int(index) for index in wanted])
    else:
        around = wanted[:, None] + np.arange(slab) - slab // 2
        needed, where = np.unique(np.clip(around, 0, len(source.positions) - 1), return_inverse=True)
        slices = source.read([int(index) for index in needed])
        frames = slices[torch.from_numpy(where.reshape(around.shape))].squeeze(2)
    if len(clips) == 1:
        return [FrameSequence(frames, positions, source.unit)]
    places = [torch.from_numpy(np.searchsorted(wanted, indices)) for indices in clips]
    return [FrameSequence(frames[place], positions[place], source.unit) for place in places]
