"""What happens when in a long video: windows slide over it, and those that are surest and do not overlap remain."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.loading.worker_pool import watched_call
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.data.readers.open import open_source
from videogru.errors import ConfigError, SourceError
from videogru.inference.predictor import Predictor
from videogru.kinds import KINDS

HOPS_PER_WINDOW = 4  # of the shortest length
MAX_WINDOWS = 1_000_000
MIN_CONFIDENCE = 0.7
_COST = 1e-6  # of a window: decides between equals


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a video and the class it shows; confidence: the probability of that class, the mean of its windows'."""

    start_seconds: float
    end_seconds: float
    label: str
    confidence: float


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """All windows of one video with their scores, and the segments chosen among them, in order of time.

    extent: (start, end) of the video; windows: (N, 2) start and end; probabilities: (N K), NaN where reading failed;
    reason: why, of the first of these.
    """

    path: Path
    classes: tuple[str, ...]
    extent: tuple[float, float]
    windows: Float64[np.ndarray, "N 2"]
    probabilities: Float32[np.ndarray, "N K"]
    segments: tuple[Segment, ...]
    reason: str = ""

    @property
    def lost(self) -> int:
        """How many windows could not be read."""
        return int(np.isnan(self.probabilities).any(axis=1).sum())


def read_timeline(
    predictor: Predictor,
    path: Path,
    *,
    window_seconds: Sequence[float] = (),
    min_confidence: float = MIN_CONFIDENCE,
    num_workers: int | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Timeline:
    """Classify windows of the given lengths all over a video, `choose` some that do not overlap, and `join` them.

    window_seconds: lengths; none: those the model was trained with. Windows start every quarter of the shortest length.
    tick: called with the number of windows done since the last call, and of all. Raises ConfigError where the model
    reads no videos or no length is known, SourceError where the video, or every window of it, cannot be read.
    """
    record = KINDS[predictor.card.kind]
    if not record.has_times:
        raise ConfigError(f"windows are parts of a video, and this model reads {record.plural}")
    lengths = tuple(window_seconds) or predictor.card.window_seconds
    if not lengths:
        raise ConfigError(
            "this model was trained on whole videos: how long are the windows?",
            hint="Say so, for example: --window-seconds 2",
        )
    if not all(math.isfinite(length) and length > 0 for length in lengths):
        raise ConfigError(f"--window-seconds wants lengths above 0, got {', '.join(f'{x:g}' for x in lengths)}")
    extent_of = partial(_extent_of, data=predictor.data)
    seconds = predictor.data.decode_timeout_seconds
    extent = extent_of(path) if num_workers == 0 else watched_call(extent_of, path, timeout_seconds=seconds)
    # Before they are made: a length in microseconds would fill the memory.
    many = HOPS_PER_WINDOW * len(lengths) * (extent[1] - extent[0]) / min(lengths)
    if many > MAX_WINDOWS:
        raise SourceError(
            f"{extent[1] - extent[0]:g} seconds make about {many:,.0f} windows, more than {MAX_WINDOWS:,}",
            where=path,
            hint="Use longer windows: --window-seconds 10",
        )
    windows = slide(extent, lengths)
    corpus = _windows_of(path, windows, predictor.card.classes)
    said = predictor.predict(
        corpus,
        np.arange(len(windows), dtype=np.int64),
        num_workers=num_workers,
        tick=lambda done: tick(done, len(windows)),
    )
    if said.failed.all():
        raise SourceError(f"no window can be read; the first: {said.errors[0]}", where=path)
    kept = choose(windows, said.confidence, min_confidence=min_confidence)
    segments = join(
        Segment(
            float(windows[k, 0]),
            float(windows[k, 1]),
            predictor.card.classes[said.predicted[k]],
            float(said.confidence[k]),
        )
        for k in kept.tolist()
    )
    probabilities = said.probabilities.astype(np.float32)
    reason = next((error for error in said.errors if error), "")
    return Timeline(path, predictor.card.classes, extent, windows, probabilities, segments, reason)


def slide(extent: tuple[float, float], lengths: Sequence[float]) -> Float64[np.ndarray, "N 2"]:
    """(N, 2) windows of each length all over the extent; a length beyond it gives the extent itself, once.

    extent    |------------------------|
    length 8  [=======]
                [=======]                       hop: a quarter of the shortest length
                  ...           [=======]       the last one ends where the video ends
    """
    start, end = extent
    hop = min(min(lengths), end - start) / HOPS_PER_WINDOW
    found: list[tuple[float, float]] = []
    for length in sorted({min(length, end - start) for length in lengths}):
        count = math.floor((end - start - length) / hop + 1e-9) + 1
        found += [(start + k * hop, start + k * hop + length) for k in range(count)]
        if found[-1][1] < end - hop / 2:
            found.append((end - length, end))
    return np.round(np.asarray(found, dtype=np.float64), 9)


def choose(
    windows: Float64[np.ndarray, "N 2"], confidence: NDArray[np.floating], *, min_confidence: float
) -> Int64[np.ndarray, " M"]:
    """Indices of windows that do not overlap, in order of time: those that are worth most together.

    A window is worth how far its confidence lies above min_confidence, times the root of its seconds: by seconds alone
    a long window beats the short one that is surer; without them many short ones beat the long one that they fill. Of
    equal choices the one with fewer windows is taken; windows without a score (NaN) do not count. Weighted interval
    scheduling (Kleinberg and Tardos 2005, section 6.1), so no better choice exists.
    """
    usable = np.flatnonzero(np.nan_to_num(confidence, nan=-1.0) > min_confidence)
    order = usable[np.argsort(windows[usable, 1], kind="stable")]
    starts, ends = windows[order, 0], windows[order, 1]
    worth = (confidence[order].astype(np.float64) - min_confidence) * np.sqrt(ends - starts) - _COST
    # How many windows end before each one starts; to the nanosecond.
    before = np.searchsorted(ends, starts + 1e-9, side="right")
    best = np.zeros(len(order) + 1)
    taken = np.zeros(len(order), dtype=np.bool_)
    for k in range(len(order)):
        with_it = worth[k] + best[before[k]]
        taken[k] = with_it > best[k]
        best[k + 1] = max(with_it, best[k])
    kept = []
    k = len(order) - 1
    while k >= 0:
        if taken[k]:
            kept.append(int(order[k]))
            k = int(before[k]) - 1
        else:
            k -= 1
    return np.asarray(kept[::-1], dtype=np.int64)


def join(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Segments in order of time, those of one class that touch as one: what lasts longer than any window is one thing.

    Its confidence is their mean, weighted by seconds.
    """
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last is None or last.label != segment.label or segment.start_seconds - last.end_seconds > 1e-6:
            joined.append(segment)
            continue
        first, second = (one.end_seconds - one.start_seconds for one in (last, segment))
        confidence = (last.confidence * first + segment.confidence * second) / (first + second)
        joined[-1] = Segment(last.start_seconds, segment.end_seconds, last.label, confidence)
    return tuple(replace(segment, confidence=round(segment.confidence, 6)) for segment in joined)


def _extent_of(path: Path, *, data: DataConfig) -> tuple[float, float]:
    with open_source(path, data=data, kind="video") as source:
        return source.extent


def _windows_of(path: Path, windows: Float64[np.ndarray, "N 2"], classes: tuple[str, ...]) -> Corpus:
    manifest = build_manifest(Path(), classes, [str(path)] * len(windows), [-1] * len(windows))
    manifest = replace(manifest, start_seconds=windows[:, 0].copy(), end_seconds=windows[:, 1].copy())
    return Corpus(
        name=str(path), kind="video", classes=classes, manifest=manifest, arrays=None, card=None, missing=0, notes=()
    )
