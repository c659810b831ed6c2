"""A picture of pairs of sources that look the same, side by side, for a person to judge."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from videogru.config import DataConfig
from videogru.data.loading.worker_pool import watched_map
from videogru.data.manifests.corpus import Corpus
from videogru.data.readers.open import open_source
from videogru.data_check.duplicates import Pair, Uses
from videogru.errors import DataError, SourceError
from videogru.kinds import Kind

MOST_PAIRS = 24
_FRAMES = 3  # of each source: at a sixth, the middle, and five sixths
_SIDE, _GAP, _TEXT = 112, 8, 30


def write_contact_sheet(path: Path, pairs: Sequence[Pair], uses: Uses, corpus: Corpus, data: DataConfig) -> None:
    """Draw the first pairs that are not the same file; nothing is written where there is none.

    Raises DataError where the picture cannot be written.
    """
    shown = [pair for pair in pairs if pair.same != "file"][:MOST_PAIRS]
    if not shown:
        return
    wanted = sorted({one for pair in shown for one in (pair.first, pair.second)})
    strips = _strips([uses.sources[one] for one in wanted], corpus, data)
    width = 2 * _FRAMES * _SIDE + 3 * _GAP
    sheet = Image.new("RGB", (width, len(shown) * (_SIDE + _TEXT + _GAP) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, pair in enumerate(shown):
        top = _GAP + place * (_SIDE + _TEXT + _GAP)
        kind = "leak" if pair.leak else "conflict" if pair.conflict else "repeat"
        for side, one in enumerate((pair.first, pair.second)):
            left = _GAP + side * (_FRAMES * _SIDE + _GAP)
            said = kind if not side else f"{pair.same}, distance {pair.distance:.3f}"
            lines = f"{said}: {uses.split(one)} {uses.label(one)}\n{_end_of(uses.sources[one])}"
            draw.multiline_text((left, top), lines, fill="black", font=font)
            strip = strips.get(uses.sources[one])
            if strip is not None:
                sheet.paste(Image.fromarray(strip), (left, top + _TEXT))
    part = path.with_name(path.name + ".part")
    try:
        sheet.save(part, format="PNG")
        part.replace(path)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=path) from error


def _end_of(name: str) -> str:
    printable = name.encode("ascii", "backslashreplace").decode().replace("\n", "\\n")
    return printable if len(printable) <= 54 else "..." + printable[-51:]


def _strips(names: list[str], corpus: Corpus, data: DataConfig) -> dict[str, NDArray[np.uint8]]:
    """{source: (112, 3 * 112, 3)}; a source that cannot be read any more is left out."""
    if corpus.arrays is not None:
        row_of = {str(source): row for row, source in enumerate(corpus.manifest.sources.tolist())}
        arrays = {name: corpus.arrays[row_of[name]] for name in names}
        return {
            name: _strip(torch.from_numpy(np.ascontiguousarray(array[_middles(len(array))])))
            for name, array in arrays.items()
        }
    read = partial(_read_strip, root=corpus.manifest.root, kind=corpus.kind, data=data)
    found = watched_map(read, names, num_workers=1, timeout_seconds=data.decode_timeout_seconds)
    return {name: strip for name, strip in found if not isinstance(strip, SourceError)}


def _read_strip(name: str, *, root: Path, kind: Kind, data: DataConfig) -> NDArray[np.uint8]:
    with open_source(root / name, data=data, kind=kind) as source:
        return _strip(source.read(np.unique(_middles(len(source.positions))).tolist()))


def _middles(count: int) -> NDArray[np.int64]:
    return np.unique(((np.arange(_FRAMES) + 0.5) * count / _FRAMES).astype(np.int64))


def _strip(frames: torch.Tensor) -> NDArray[np.uint8]:
    """Frames (T C H W) side by side, each fitted into a square."""
    values = frames if frames.dtype == torch.uint8 else (frames * 255).round().byte()
    strip = Image.new("RGB", (_FRAMES * _SIDE, _SIDE), "lightgray")
    for place, frame in enumerate(values.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()):
        picture = Image.fromarray(frame)
        scale = _SIDE / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        strip.paste(picture, (place * _SIDE + (_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return np.asarray(strip)
