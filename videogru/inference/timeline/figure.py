"""A picture of a timeline: frames of the video, the scores of the named classes over time, and the segments."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from videogru.errors import ConfigError
from videogru.inference.timeline.timeline import Timeline

FRAMES = 12
_CLASSES = 10
_INK, _SOFT = "#1d2733", "#8a94a0"


def draw_timeline(timeline: Timeline, frames: NDArray[np.uint8], times: NDArray[np.float64]) -> bytes:
    """PNG of a timeline; frames: (T H W 3) with their times in seconds, shown above the scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start, end = timeline.extent
    shown = _shown(timeline)
    figure = Figure(figsize=(12, 3.4 + 0.24 * len(shown)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    strip, bars, scores = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.3, 0.8, 0.4 + 0.24 * len(shown)]}
    )
    width = (end - start) / max(1, len(frames))
    for frame, time in zip(frames, times, strict=True):
        left = start + width * int(min((time - start) // width, len(frames) - 1))
        strip.imshow(frame, extent=(left, left + 0.97 * width, 0, 1), aspect="auto")
    strip.set(xlim=(start, end), ylim=(0, 1), yticks=[])
    strip.set_title(timeline.path.name, loc="left", fontsize=10, color=_INK, parse_math=False)

    colors = _colors(len(shown))
    for segment in timeline.segments:
        row = shown.index(segment.label) if segment.label in shown else -1
        length = segment.end_seconds - segment.start_seconds
        color = colors[row] if row >= 0 else _SOFT
        bars.broken_barh([(segment.start_seconds, length)], (0.1, 0.8), facecolor=color, edgecolor="white")
        bars.text(
            segment.start_seconds + length / 2,
            0.5,
            f"{segment.label}\n{segment.confidence:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white",
            clip_on=True,
            parse_math=False,
        )
    bars.set(ylim=(0, 1), yticks=[])
    bars.set_ylabel("segments", fontsize=8, color=_SOFT)

    if shown:
        image, edges = _heat(timeline, shown)
        scores.set_facecolor("#eceef0")  # where no window speaks
        drawn = scores.pcolormesh(edges, np.arange(len(shown) + 1), image, vmin=0, vmax=1, cmap="Blues")
        figure.colorbar(drawn, ax=[strip, bars, scores], label="probability", pad=0.01, fraction=0.03)
        scores.set_yticks(np.arange(len(shown)) + 0.5, shown, fontsize=8)
        for label in scores.get_yticklabels():
            label.set_parse_math(False)
        scores.invert_yaxis()
    else:
        scores.text(0.5, 0.5, "no segment", transform=scores.transAxes, ha="center", va="center", color=_SOFT)
        scores.set_yticks([])
    scores.set_xlabel("seconds", fontsize=8, color=_SOFT)
    for axes in (strip, bars, scores):
        axes.tick_params(labelsize=8, colors=_SOFT)
        for spine in axes.spines.values():
            spine.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_picture(path: Path, content: bytes) -> None:
    """Write a picture, whole or not at all. Raises ConfigError where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"the picture cannot be written: {error.strerror}", where=path) from error


def _shown(timeline: Timeline) -> list[str]:
    """Classes of the segments in order of time, then those with the highest peaks, at most ten."""
    named = list(dict.fromkeys(segment.label for segment in timeline.segments))
    if len(named) < _CLASSES and len(timeline.probabilities):
        peaks = np.nan_to_num(timeline.probabilities, nan=0.0).max(axis=0)
        named += [
            name
            for k in np.argsort(-peaks, kind="stable")
            if (name := timeline.classes[k]) not in named and peaks[k] > 0.3
        ]
    return named[:_CLASSES]


def _heat(timeline: Timeline, shown: list[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(rows columns) highest probability of any window over each moment, NaN without one, and the edges in seconds."""
    start, end = timeline.extent
    edges = np.linspace(start, end, 241)
    heat = np.full((len(shown), len(edges) - 1), np.nan)
    codes = [timeline.classes.index(name) for name in shown]
    scores = timeline.probabilities[:, codes]
    # A window speaks for its middle half: at its ends it mostly sees what comes before and after.
    quarter = (timeline.windows[:, 1] - timeline.windows[:, 0]) / 4
    first = np.searchsorted(edges, timeline.windows[:, 0] + quarter, side="right") - 1
    last = np.searchsorted(edges, timeline.windows[:, 1] - quarter, side="left")
    for window in range(len(timeline.windows)):
        part = heat[:, first[window] : max(last[window], first[window] + 1)]
        np.fmax(part, scores[window][:, None], out=part)
    return heat, edges


def _colors(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    # Without its blue, which is that of the scores.
    return [tuple(colormaps["tab10"](1 + k % 9)) for k in range(count)]
