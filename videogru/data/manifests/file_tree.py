"""Which of many named files lie below a root: folders are listed, each at most once, and no file is asked for.

Listing beats asking: a folder of 25,000 videos is one walk over its entries instead of 25,000 questions. A folder whose
parent does not list it is absent without a look of its own, so neither 10 million files that are not there nor a
folder for each of them cost more than the folders that are.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from videogru.data.manifests.columns import Text
from videogru.errors import DataError

_MANY_SUFFIXES = 10_000


class Listing(NamedTuple):
    """What a folder holds: all names, those of links to places outside of the root, and those of other folders."""

    names: set[str]
    strays: set[str]
    folders: set[str]


_ANYTHING = Listing(set(), set(), set())  # stands above the root, which need not be listed to be there


class Tree:
    """Folders below `root` (resolved), read as needed; listings of folders that hold wanted folders are kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parents: dict[str, Listing | None] = {}

    def listing(self, folder: str) -> Listing | None:
        """What lies in `folder`, a POSIX path relative to the root ('' is the root itself); None where it is absent.

        Raises DataError where the folder is there but cannot be listed.
        """
        above = self._above(folder)
        if above is not _ANYTHING and (above is None or folder.rpartition("/")[2] not in above.names):
            return None
        place = self.root / folder
        names, links, folders = set(), [], set()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    names.add(entry.name)
                    if entry.is_symlink():
                        links.append(entry.name)
                    elif entry.is_dir():
                        folders.add(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"cannot be listed: {error.strerror}", where=place) from error
        strays = {name for name in links if not _resolved(place / name).is_relative_to(self.root)}
        return Listing(names, strays, folders | {name for name in links if (place / name).is_dir()} - strays)

    def leaves(self, folder: str) -> bool:
        """A link on the way to `folder` leads out of the root."""
        if not folder:
            return False
        parent, _, name = folder.rpartition("/")
        above = self._above(folder)
        return self.leaves(parent) or (above is not None and name in above.strays)

    def _above(self, folder: str) -> Listing | None:
        parent, _, name = folder.rpartition("/")
        if not folder or name in ("", "."):
            return _ANYTHING
        if parent not in self._parents:
            self._parents[parent] = self.listing(parent)
        return self._parents[parent]


def _resolved(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # a link to itself: it leads nowhere, and is told when it is read
        return link


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; nothing hidden."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class Places(NamedTuple):
    """(N,) sources by folder: `codes` int32 into `folders`; the name of a row is what follows its last slash."""

    codes: NDArray[np.int32]
    folders: Text

    def by_folder(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """(folder, its rows in order), folders in the order of their first row."""
        order = np.argsort(self.codes, kind="stable")
        ends = np.cumsum(np.bincount(self.codes, minlength=len(self.folders)))
        for code, folder in enumerate(self.folders):
            start = int(ends[code - 1]) if code else 0
            yield folder, order[start : int(ends[code])]


def places_of(sources: Text) -> Places:
    """The folder of each source ('' for none)."""
    parts = []
    for _, chunk in sources.chunks():
        pieces = _split_last(chunk, b"/")
        first = pieces.flatten().take(pieces.offsets.slice(0, len(chunk)))
        parts.append(pc.if_else(pc.equal(pc.list_value_length(pieces), 2), first, pa.scalar(b"", first.type)))
    if not parts:
        return Places(np.empty(0, np.int32), Text.of([]))
    encoded = pa.chunked_array(parts).dictionary_encode().combine_chunks()
    return Places(encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32), Text.of_arrow(encoded.dictionary))


def absent(sources: Text, rows: NDArray[np.int64], names: set[str]) -> NDArray[np.int64]:
    """Those of `rows`, all of one folder, whose file name is not in `names`."""
    listed = pa.array([name.encode("utf-8", "surrogatepass") for name in names], pa.large_binary())
    pieces = _split_last(sources[rows].arrow(), b"/")
    last = pieces.flatten().take(pc.subtract(pieces.offsets.slice(1), 1))
    there: NDArray[np.bool_] = np.asarray(pc.is_in(last, value_set=listed), bool)
    return rows[~there]


def first_of_each_suffix(sources: Text) -> list[int]:
    """For each different suffix (of .gz: with the one before), the first row that has it, increasing.

    Of more than 10,000 different ones only some: most of these are no suffixes that anybody knows.
    """
    first: dict[bytes, int] = {}
    for start, chunk in sources.chunks():
        if len(first) > _MANY_SUFFIXES:
            break
        for pieces in (1, 2):
            split = _split_last(chunk, b".", pieces)
            ends = split.flatten().take(pc.subtract(split.offsets.slice(1), 1))
            if pieces == 2:  # the part before the .gz
                rows = np.flatnonzero(np.asarray(pc.equal(pc.binary_length(ends), 2), bool))
                split, ends = split.take(pa.array(rows)), ends.take(pa.array(rows))
                if not len(rows):
                    continue
                before = split.flatten().take(pc.max_element_wise(pc.subtract(split.offsets.slice(1), 2), 0))
                ends = pc.binary_join_element_wise(before, ends, pa.scalar(b".", ends.type))
            else:
                rows = np.arange(len(chunk))
            encoded = ends.dictionary_encode()
            codes = encoded.indices.to_numpy(zero_copy_only=False)
            places = np.empty(len(encoded.dictionary), np.int64)
            places[codes[::-1]] = rows[::-1]
            for suffix, row in zip(encoded.dictionary.to_pylist(), places.tolist(), strict=True):
                first.setdefault(suffix, start + row)
    return sorted(set(first.values()))


def _split_last(texts: Any, mark: bytes, times: int = 1) -> Any:
    return pc.split_pattern(texts, mark, max_splits=times, reverse=True)
