"""What every reader offers, whatever it reads."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import Kind
from videogru.errors import DataError
from videogru.sequence import Unit

SUFFIXES: dict[Kind, frozenset[str]] = {
    "video": frozenset(
        {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".asf"}
        | {".flv", ".gif", ".3gp", ".3g2", ".ogv", ".vob"}
    ),
    "volume": frozenset({".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz", ".mgh", ".mgz", ".mgh.gz"}),
    "image": frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}),
}
_KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


def kind_of_name(name: str) -> Kind | None:
    """The kind a file name's suffix stands for, None for an unknown one."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    compressed = suffixes[-1:] == [".gz"]
    return _KIND_OF.get("".join(suffixes if compressed else suffixes[-1:]))


def media_files(folder: Path, ignored: Counter[str] | None = None) -> list[Path]:
    """Files of any known kind below a folder, sorted; nothing hidden, and of a header and image pair only the header.

    ignored: counts the suffixes of the other files. Raises DataError where a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot be listed: {error.strerror}", where=error.filename) from error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        present = set(names)
        for name in sorted(names):
            if name.startswith(".") or (".img" in name and name.replace(".img", ".hdr") in present):
                continue
            if kind_of_name(name) is not None:
                found.append(Path(parent, name))
            elif ignored is not None:
                ignored[Path(name).suffix] += 1
    return found


@runtime_checkable
class FrameSource(Protocol):
    """One opened source: where its steps lie, and a way to read some of them. Use it in a `with` block.

    kind: video, volume or image; positions: (N,) float64, strictly increasing: the start of each frame in seconds, the
    center of each slice in mm, or 0 for a still; extent: (start, end) in the same unit, end being the end of the last
    step; pixel_aspect: height of a pixel over its width; details: what `videogru data info` shows (plain values).
    """

    path: Path
    kind: Kind
    unit: Unit
    positions: NDArray[np.float64]
    extent: tuple[float, float]
    pixel_aspect: float
    details: dict[str, object]

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The steps at increasing `indices` (of `positions`) as (T C H W), uint8 in 0..255 or float32 in 0..1.

        Raises SourceError where the steps cannot be read as promised.
        """
        ...

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        ...

    def __enter__(self) -> "FrameSource": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
