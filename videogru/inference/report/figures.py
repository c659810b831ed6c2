"""Pictures for the report: charts as inline SVG that follow the page's colors, frames and big matrices as data URIs.

Charts hold only our own words; names from files stay in the template, which escapes them.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from markupsafe import Markup
from PIL import Image

from videogru.inference.evaluation import CalibrationBin, Roc

MAX_STRIP = 8
FRAME_SIDE = 160  # pixels of the longer side; a frame is shown at about half of that
# Stand-ins that Matplotlib draws with; the page's style sheet gives the true color, light or dark.
INK, SOFT, LINE, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", FIRST: "--first", SECOND: "--second"}

Series = tuple[str, str, Sequence[int], Sequence[float]]  # name, color, x, y


def line_chart(series: Sequence[Series], *, title: str, x_label: str, unit_range: bool) -> Markup:
    """Lines over epochs as inline SVG; `unit_range` holds the y axis to 0..1."""
    figure, axes = _axes(title, x_label)
    for name, color, x, y in series:
        marker = "o" if len(x) < 25 else ""
        axes.plot(x, y, color=color, label=name, linewidth=1.6, marker=marker, markersize=2.5)
    if unit_range:
        axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return _svg(figure, title)


def roc_chart(roc: Roc, area: str) -> Markup:
    """The ROC curve of class 1 and the diagonal of chance."""
    figure, axes = _axes("ROC", "False positive rate", square=True)
    axes.set_ylabel("True positive rate", color=SOFT)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--", label="chance")
    x, y = roc.false_positive_rate, roc.true_positive_rate
    axes.plot(x, y, color=FIRST, linewidth=1.8, label=f"AUROC {area}")
    axes.fill_between(x, y, color=FIRST, alpha=0.1, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    _legend(figure, axes)
    return _svg(figure, "ROC curve")


def reliability_chart(bins: Sequence[CalibrationBin], error: str) -> Markup:
    """Accuracy by confidence (bars), the ideal (diagonal), and how many samples stand behind each bar (below)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    full = [calibration for calibration in bins if calibration.count]
    left, width = [b.low for b in full], bins[0].high - bins[0].low
    total = sum(b.count for b in full)
    above.bar(left, [b.accuracy for b in full], width, align="edge", color=FIRST, alpha=0.55, label="accuracy")
    above.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--", label="ideal")
    above.plot(
        [b.confidence for b in full], [b.accuracy for b in full], "o", color=SECOND, markersize=3.5, label="bin mean"
    )
    above.set(xlim=(0, 1), ylim=(0, 1.02))
    above.set_ylabel("Accuracy", color=SOFT)
    below.bar(left, [b.count / total for b in full], width, align="edge", color=SOFT, alpha=0.5)
    below.set_ylabel("Share", color=SOFT)
    below.set_xlabel("Confidence", color=SOFT)
    below.set_ylim(0, max(b.count / total for b in full) * 1.1)
    for axes in (above, below):
        _dress(axes)
    above.set_title(f"Reliability, calibration error {error}", loc="left", color=INK, fontsize=9.5, fontweight="bold")
    _legend(figure, above)
    return _svg(figure, "Reliability diagram")


def confusion_picture(confusion: Int64[np.ndarray, "K K"]) -> str:
    """A (K K) matrix as a PNG data URI: opacity is the share of the true class (its square root, so that few show)."""
    support = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    share = np.sqrt(confusion / support)
    pixels = np.zeros((*confusion.shape, 4), dtype=np.uint8)
    pixels[...] = (197, 84, 24, 0)
    diagonal = np.arange(len(confusion))
    pixels[diagonal, diagonal] = (37, 99, 190, 0)  # right answers have the other color
    pixels[..., 3] = np.round(share * 255)
    scale = max(1, round(640 / len(confusion)))
    picture = Image.fromarray(pixels)
    side = len(confusion) * scale
    return data_uri(picture.resize((side, side), Image.Resampling.NEAREST), "PNG")


def strip_pictures(frames: UInt8[np.ndarray, "T H W 3"]) -> list[str]:
    """At most 8 of T frames, evenly spread with both ends, as data URIs no larger than they are shown."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MAX_STRIP)).round().astype(int))
    pictures = []
    for frame in frames[chosen]:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        scale = FRAME_SIDE / max(picture.size)
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        gray = bool((frame[..., 0] == frame[..., 1]).all() and (frame[..., 0] == frame[..., 2]).all())
        # Scans stay exact; JPEG's rings would look like findings.
        pictures.append(data_uri(picture.convert("L"), "PNG") if gray else data_uri(picture, "JPEG"))
    return pictures


def data_uri(picture: Image.Image, kind: str) -> str:
    """The picture as a data: URI, kind PNG or JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def curve_series(curves: Sequence[Mapping[str, float]], columns: Mapping[str, tuple[str, str]]) -> list[Series]:
    """Series over epochs (from 1) for the columns that have values; several values of an epoch are averaged."""
    found: list[Series] = []
    for column, (name, color) in columns.items():
        by_epoch: dict[int, list[float]] = {}
        for row in curves:
            if column in row and "epoch" in row:
                by_epoch.setdefault(int(row["epoch"]) + 1, []).append(row[column])
        if by_epoch:
            x = sorted(by_epoch)
            found.append((name, color, x, [float(np.mean(by_epoch[epoch])) for epoch in x]))
    return found


def _axes(title: str, x_label: str, *, square: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4.6) if square else (3.5, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontsize=9.5, fontweight="bold")
    axes.set_xlabel(x_label, color=SOFT)
    _dress(axes)
    return figure, axes


def _dress(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=8, length=0, pad=5)
    axes.xaxis.label.set_fontsize(8.5)
    axes.yaxis.label.set_fontsize(8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)


def _legend(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    # Below the axes, where no line can run through it.
    figure.legend(
        handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK, handlelength=1.6
    )


def _svg(figure: Any, label: str) -> Markup:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "videogru"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page has its own fonts and colors, and names no outside address.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;]*; ", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to them, and a page may have each id once
    size = re.search(r'viewBox="[^"]*"', svg)
    if size is None:
        raise RuntimeError("Matplotlib wrote an SVG without a viewBox")
    svg = svg[svg.index(">") + 1 :]
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return Markup(f'<svg role="img" aria-label="{label}" {size.group()}>{svg}')
