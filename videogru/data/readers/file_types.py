"""File types: the kind of a file by its name or content, and the media files of a folder."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from videogru.data.readers.dicom_files import (
    DICOM_SUFFIXES,
    has_magic,
    head_of,
    holds_dicom,
    is_dicom_name,
    may_be_dicom_name,
)
from videogru.errors import DataError
from videogru.kinds import Kind

SUFFIXES: dict[Kind, frozenset[str]] = {
    "video": frozenset(
        {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".asf"}
        | {".flv", ".gif", ".3gp", ".3g2", ".ogv", ".vob"}
    ),
    "volume": frozenset({".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz", ".mgh", ".mgz", ".mgh.gz"}),
    "image": frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}),
}


_MAX_DIGITS = 18  # of an int64


_KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


_KIND_OF |= dict.fromkeys(DICOM_SUFFIXES, "volume")


def kind_of_name(name: str) -> Kind | None:
    """The kind a file name's suffix stands for, None for an unknown one."""
    # As Path.suffixes has it, which is slow; there are folders of 100,000 frames.
    parts = name.rstrip("/").rpartition("/")[2].lstrip(".").lower().rsplit(".", 2)
    if len(parts) == 1:
        return None
    return _KIND_OF.get("." + (".".join(parts[1:]) if parts[-1] == "gz" else parts[-1]))


def kind_of_source(path: Path) -> Kind | None:
    """The kind of a file or folder: by its name, else a folder with DICOM files is a volume, any other may be a video.

    None for a file of no known kind, and for what is not there.
    """
    kind = kind_of_name(path.name)
    if kind is not None:
        return kind
    if path.is_dir():
        return "volume" if holds_dicom(path) else "video"
    try:
        return "volume" if path.is_file() and has_magic(head_of(path)) else None
    except OSError:
        return None


class NumberedImages(NamedTuple):
    """The images of a frame folder in the order of their numbers, (N,) int64 and strictly increasing."""

    names: tuple[str, ...]
    numbers: NDArray[np.int64]


def numbered_images(names: Iterable[str]) -> NumberedImages:
    """The frames among the names of a folder's files: at least 2 images like img_1.jpg, img_2.jpg, ..., img_10.jpg.

    What is hidden or of no known kind is left out. Raises ValueError with the reason where the rest is anything but
    images of one pattern, which is what stands before and after a number at the end of the name.
    """
    found: dict[int, str] = {}
    pattern: tuple[str, str] | None = None
    example = ""
    for name in names:
        kind = kind_of_name(name)
        if kind is None or name.startswith("."):
            continue
        stem, _, suffix = name.rpartition(".")
        before = stem.rstrip("0123456789")
        digits = stem[len(before) :]
        if kind != "image" or not 1 <= len(digits) <= _MAX_DIGITS:
            raise ValueError(f"{name} is no image with a number at the end of its name")
        if pattern is None:
            pattern, example = (before, suffix.lower()), name
        elif (before, suffix.lower()) != pattern:
            raise ValueError(f"{example} and {name} are not of one pattern")
        number = int(digits)
        if number in found:
            raise ValueError(f"{found[number]} and {name} have the same number")
        found[number] = name
    if len(found) < 2:
        raise ValueError("a frame folder holds at least 2 numbered images" + (f", not only {example}" * len(found)))
    numbers = np.array(sorted(found), np.int64)
    return NumberedImages(tuple(found[number] for number in numbers.tolist()), numbers)


def media_files(
    folder: Path,
    ignored: Counter[str] | None = None,
    *,
    frame_folders: bool = False,
    series: set[Path] | None = None,
) -> list[Path]:
    """Files of any known kind below a folder, sorted; nothing hidden, and of a header and image pair only the header.

    A folder (also `folder` itself) in which DICOM files lie stands for them: it is a volume, or holds several; such
    folders are added to `series`.
    ignored: counts the suffixes of the other files; frame_folders: a folder below (not `folder` itself) that holds
    numbered images, and no media in folders of its own, stands for them: it is a video. Raises DataError where a folder
    cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot be listed: {error.strerror}", where=error.filename) from error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        present = set(names)
        inside: list[Path] = []
        if dicom := holds_dicom(Path(parent), names):
            inside.append(Path(parent))
            if series is not None:
                series.add(Path(parent))
        for name in sorted(names):
            if dicom and (is_dicom_name(name) or may_be_dicom_name(name)):
                continue
            if name.startswith(".") or (".img" in name and name.replace(".img", ".hdr") in present):
                continue
            if kind_of_name(name) is not None:
                inside.append(Path(parent, name))
            elif ignored is not None:
                ignored[Path(name).suffix] += 1
        if frame_folders and Path(parent) != folder and are_frames(names):
            below = [path for name in folders for path in media_files(Path(parent, name))]
            inside = inside if below else [Path(parent)]
        found += inside
    return found


def are_frames(names: Iterable[str]) -> bool:
    """Whether the files of a folder are the frames of one video, as `numbered_images` has it."""
    try:
        numbered_images(names)
    except ValueError:
        return False
    return True
