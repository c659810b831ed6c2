"""The tables and folders of Kinetics, as their publisher and those who fetched the clips leave them."""

import os
from collections.abc import Iterator
from pathlib import Path

from videogru.data.manifests.file_tree import subfolders
from videogru.data.manifests.table import read_table
from videogru.data.readers.file_types import kind_of_name
from videogru.errors import DataError


def kinetics_table(place: Path, names: tuple[str, ...]) -> Path | None:
    """train.csv, or a longer name that ends so (kinetics-400_train.csv), beside the clips or in annotations/."""
    for folder in (place, place / "annotations"):
        for name in names:
            tables = [path for path in folder.glob(f"*{name}.csv") if path.stem[: -len(name)][-1:] in ("", "_", "-")]
            if tables:
                return min(tables, key=lambda path: (len(path.name), path.name))
    return None


def kinetics_rows(path: Path) -> Iterator[tuple[str, int, int, str, str]]:
    """(youtube_id, start, end, label, line) of each row; the label is '' where it is held out."""
    header, rows, lines = read_table(path)
    wanted = ("youtube_id", "time_start", "time_end")
    if any(name not in header for name in wanted):
        raise DataError(f"expected the columns {', '.join(wanted)}, found {', '.join(header)}", where=path)
    at = [header.index(name) for name in wanted]
    label_at = header.index("label") if "label" in header else None
    for cells, line in zip(rows, lines, strict=True):
        where = f"{path}:{line}"
        youtube_id, start, end = (cells[column] for column in at)
        try:
            times = int(float(start)), int(float(end))
        except (ValueError, OverflowError):
            raise DataError(f"time_start {start!r} or time_end {end!r} is no number", where=where) from None
        yield youtube_id, *times, "" if label_at is None else cells[label_at].strip(), where


def kinetics_clips(place: Path, names: tuple[str, ...]) -> dict[str, str]:
    """{file stem: path below `place`} of a split's videos, directly in its folder or one deeper; one listing each."""
    clips: dict[str, str] = {}
    for top in (name for name in names if (place / name).is_dir()):
        for folder in (top, *(f"{top}/{label}" for label in subfolders(place / top))):
            with os.scandir(place / folder) as entries:
                for entry in entries:
                    if kind_of_name(entry.name) == "video":
                        clips[entry.name.rpartition(".")[0]] = f"{folder}/{entry.name}"
                    elif entry.is_dir():  # its frames, extracted
                        clips.setdefault(entry.name, f"{folder}/{entry.name}")
    return clips
