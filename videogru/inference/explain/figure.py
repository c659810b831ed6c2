"""A picture of an explanation: the steps with those that mattered marked, their contributions, and where it stands."""

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.inference.explain.explain import STRONGEST, Explanation
from videogru.shapes import ClipFrames

TILES = 28
_ACROSS = 14
_INK, _SOFT, _MARK = "#1d2733", "#8a94a0", "#d1495b"
_UNITS = {"seconds": "seconds", "mm": "mm", "index": "step"}
_SHORT = {"seconds": "s", "mm": "mm", "index": ""}


def draw_explanation(explanation: Explanation, frames: ClipFrames, *, title: str, label: str) -> bytes:
    """PNG of an explanation of class `label`; frames: those the model read (T C H W), as it saw them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    top = explanation.top(STRONGEST)
    shown = shown_steps(len(frames), top)
    across = min(_ACROSS, len(shown))
    rows = -(-len(shown) // across)
    figure = Figure(figsize=(13, 4.1 + 1.1 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[0.35 + 1.1 * rows, 3.7])
    sheet, below = parts
    pictures = shown_frames(frames)
    tiles = sheet.subplots(rows, _ACROSS, squeeze=False)
    for tile in tiles.flat:
        tile.set_axis_off()
    for place, step in enumerate(shown):
        _tile(tiles[divmod(place, _ACROSS)], pictures[step], explanation.positions[step], step, top)
    sheet.suptitle(
        f"{title}: {label} {_probability(explanation):.2f}",
        x=0.01,
        ha="left",
        fontsize=10,
        color=_INK,
        parse_math=False,
    )
    curve, plain, over = below.subplots(1, 3, width_ratios=[3, 1, 1])
    _curve(curve, explanation, top, label)
    _strongest(plain, over, explanation, pictures[explanation.strongest])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def shown_steps(steps: int, top: list[int]) -> list[int]:
    """At most TILES steps in order: all, or some at even distances with the top ones in the place of their nearest."""
    if steps <= TILES:
        return list(range(steps))
    even = np.linspace(0, steps - 1, TILES).round().astype(int).tolist()
    for step in top:
        if step not in even:
            free = [place for place, other in enumerate(even) if other not in top]
            even[min(free, key=lambda place: abs(even[place] - step))] = step
    return sorted(even)


def shown_frames(frames: ClipFrames) -> NDArray[np.uint8]:
    """(T C H W) as pictures (T H W 3): color as it is, else gray; of a slab's slices the middle one."""
    shown = frames if frames.dtype == torch.uint8 else (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)
    if shown.shape[1] != 3 or frames.dtype != torch.uint8:
        middle = shown.shape[1] // 2
        shown = shown[:, middle : middle + 1].expand(-1, 3, -1, -1)
    return shown.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _tile(axes: Any, picture: NDArray[np.uint8], position: float, step: int, top: list[int]) -> None:
    axes.set_axis_on()
    axes.imshow(picture)
    axes.set(xticks=[], yticks=[])
    marked = step in top
    for spine in axes.spines.values():
        spine.set(visible=marked, color=_MARK, linewidth=2.5)
    number = f"#{top.index(step) + 1}  " if marked else ""
    axes.set_xlabel(f"{number}{position:.4g}", fontsize=7, color=_MARK if marked else _SOFT, labelpad=2)


def _curve(axes: Any, explanation: Explanation, top: list[int], label: str) -> None:
    positions, parts = explanation.positions, explanation.contributions
    axes.axhline(0, color=_SOFT, linewidth=0.8)
    axes.plot(positions, parts, color=_INK, linewidth=1.2, marker="o", markersize=2.5)
    axes.plot(positions[top], parts[top], linestyle="", marker="o", markersize=6, color=_MARK)
    for rank, step in enumerate(top):
        where = (positions[step], parts[step])
        axes.annotate(f"#{rank + 1}", where, (0, 5), textcoords="offset points", ha="center", fontsize=8, color=_MARK)
    axes.margins(x=0.02, y=0.15)
    if explanation.baseline is None:
        told = f"what the logit of {label} loses without a step, per step"
    else:
        told = f"what each step adds to the logit of {label}; without any it is {explanation.baseline:+.2f}"
    axes.set_title(told, loc="left", fontsize=9, color=_INK, parse_math=False)
    axes.set_xlabel(_UNITS[explanation.unit], fontsize=8, color=_SOFT)
    axes.tick_params(labelsize=8, colors=_SOFT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _strongest(plain: Any, over: Any, explanation: Explanation, picture: NDArray[np.uint8]) -> None:
    """The strongest step, and the same with what the class stands on laid over it."""
    height, width = picture.shape[:2]
    for axes in (plain, over):
        axes.imshow(picture, extent=(0, width, height, 0))
        axes.set_axis_off()
    position = explanation.positions[explanation.strongest]
    plain.set_title(
        f"strongest step, at {position:.4g} {_SHORT[explanation.unit]}".rstrip(), loc="left", fontsize=9, color=_INK
    )
    where = explanation.where
    if not where.max() > 0:
        told = "no square that is covered\ncosts the class anything"
    else:
        told = f"covering a square costs up to {where.max():.2g}"
        over.imshow(
            where / where.max(),
            extent=(0, width, height, 0),
            cmap="inferno",
            vmin=0,
            vmax=1,
            alpha=0.5,
            interpolation="bilinear",
        )
    over.set_title(told, loc="left", fontsize=9, color=_INK)


def _probability(explanation: Explanation) -> float:
    shifted = np.exp(explanation.logits - explanation.logits.max())
    return float(shifted[explanation.code] / shifted.sum())
