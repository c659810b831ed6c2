"""A picture of one scan, three planes and slices along an axis, or of the frames of a video; to be looked at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from videogru.data.readers.source import FrameSource
from videogru.data.readers.volume.describe import ras_voxels, spacing_of
from videogru.data.readers.volume.volume import Axis, Volume, unroll
from videogru.errors import DataError

_PLANES: tuple[Axis, ...] = ("axial", "coronal", "sagittal")
# axis -> RAS axes of (T, H, W), and the letters at the left, right, top and bottom, as `unroll` turns slices
_TURNS: dict[Axis, tuple[tuple[int, int, int], str]] = {
    "axial": ((2, 1, 0), "RLAP"),
    "coronal": ((1, 2, 0), "RLSI"),
    "sagittal": ((0, 2, 1), "APSI"),
}
_PLANE, _GAP, _TEXT, _LETTER = 300, 16, 18, 16
_STRIP, _ROWS = 8, 2  # pictures in a row of the strip, and rows
_INK, _PAPER = "white", "black"


def write_scan_sheet(path: Path, source: Volume, *, axis: Axis) -> None:
    """Middle slices of the three planes, in mm, and 16 slices along `axis`, with letters of the patient's directions.

    source: opened with data.axis=axial. Superior and anterior are at the top; the patient's right is at the left, as
    radiologists look. The planes share one scale. Raises DataError where the picture cannot be written.
    """
    volume, spacing = ras_voxels(source), spacing_of(source)
    largest = max(side * size for side, size in zip(volume.shape, spacing, strict=True))
    cell, small = _PLANE + 2 * _LETTER, (3 * (_PLANE + 2 * _LETTER) + 2 * _GAP - (_STRIP - 1) * 4) // _STRIP
    width = 3 * cell + 4 * _GAP
    height = 3 * _GAP + 2 * _TEXT + cell + _TEXT + _ROWS * (small + _TEXT) + _GAP
    sheet, font = Image.new("RGB", (width, height), _PAPER), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    name = source.path.name.encode("ascii", "backslashreplace").decode()
    said = f"{name}   {source.details['orientation']}, from {source.details.get('orientation_from', 'header')}"
    draw.text((_GAP, _GAP // 2), said[:140], fill=_INK, font=font)
    draw.text((_GAP, _GAP // 2 + _TEXT), "radiological: the patient's right is at the left", fill="gray", font=font)
    top = _GAP + 2 * _TEXT
    for place, plane in enumerate(_PLANES):
        slices = unroll(volume, plane)
        middle = len(slices) // 2
        picture = _to_picture(slices[middle], source, plane, spacing, _PLANE / largest)
        left = _GAP + place * (cell + _GAP)
        at = left + (cell - picture.width) // 2, top + (cell - picture.height) // 2
        sheet.paste(picture, at)
        _letters(draw, font, at, picture.size, _TURNS[plane][1])
        draw.text((left, top + cell), f"{plane} {middle} of 0..{len(slices) - 1}", fill=_INK, font=font)
    slices, along = unroll(volume, axis), _TURNS[axis][0][0]
    top += cell + _TEXT + _GAP
    sides = [volume.shape[side] * spacing[side] for side in _TURNS[axis][0][1:]]
    for place, index in enumerate(_middles(len(slices), _STRIP * _ROWS)):
        row, column = divmod(place, _STRIP)
        picture = _to_picture(slices[index], source, axis, spacing, small / max(sides))
        left, upper = _GAP + column * (small + 4), top + row * (small + _TEXT)
        sheet.paste(picture, (left + (small - picture.width) // 2, upper + (small - picture.height) // 2))
        draw.text((left, upper + small), f"{index}: {index * spacing[along]:.4g} mm", fill=_INK, font=font)
    _save(sheet, path)


def write_frame_sheet(path: Path, source: FrameSource) -> None:
    """16 frames spread over a video, as they look. Raises DataError where the picture cannot be written."""
    chosen = _middles(len(source.positions), _STRIP * _ROWS)
    positions = source.positions[chosen]
    frames = source.read([int(index) for index in chosen])
    tall, wide = frames.shape[2] * source.pixel_aspect, float(frames.shape[3])
    side = 160
    size = max(1, round(wide * side / max(tall, wide))), max(1, round(tall * side / max(tall, wide)))
    rows = -(-len(chosen) // _STRIP)
    sheet = Image.new("RGB", (_GAP + _STRIP * (size[0] + _GAP), _GAP + rows * (size[1] + _TEXT + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pixels = frames if frames.dtype == torch.uint8 else (frames * 255).round().byte()
    for place, frame in enumerate(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()):
        row, column = divmod(place, _STRIP)
        left, top = _GAP + column * (size[0] + _GAP), _GAP + row * (size[1] + _TEXT + _GAP)
        sheet.paste(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR), (left, top))
        draw.text((left, top + size[1]), f"{chosen[place]}: {positions[place]:.3f} s", fill=_INK, font=font)
    _save(sheet, path)


def _middles(count: int, wanted: int) -> NDArray[np.int64]:
    """The middles of `wanted` equal parts of 0..count-1, each once."""
    return np.unique(((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64))


def _to_picture(
    stored: NDArray[Any], source: Volume, plane: Axis, spacing: Sequence[float], scale: float
) -> Image.Image:
    """One slice (H W) in its intensity window, at `scale` pixels for a mm."""
    low, high = source.ends
    with np.errstate(over="ignore", invalid="ignore"):
        values = stored.astype(np.float64) * source.slope + source.intercept
        unit = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)
    unit[~np.isfinite(values)] = 0
    picture = Image.fromarray((unit * 255).round().astype(np.uint8))
    _, down, across = _TURNS[plane][0]
    sides = picture.width * spacing[across] * scale, picture.height * spacing[down] * scale
    return picture.resize((max(1, round(sides[0])), max(1, round(sides[1]))), Image.Resampling.BILINEAR)


def _letters(draw: Any, font: Any, at: tuple[int, int], size: tuple[int, int], letters: str) -> None:
    (left, top), (width, height) = at, size
    places = (
        (left - 8, top + height // 2), (left + width + 8, top + height // 2),
        (left + width // 2, top - 8), (left + width // 2, top + height + 8),
    )  # fmt: skip
    for letter, place in zip(letters, places, strict=True):
        draw.text(place, letter, fill="yellow", font=font, anchor="mm")


def _save(sheet: Image.Image, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(part, format="PNG")
        part.replace(path)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=path) from error
