"""What an encoder made of clips, on disk: one array that can be mapped, and an index with a line per clip.

  features.f32    float32 (steps D h w), the steps of one clip after those of another
  index.jsonl     key, source, stamp, content, offset, length (steps), gaps, crc; or error in place of the last four

Both only grow. A clip's steps are written before its line, so what a kill leaves is whole up to its last line; what
lies behind is cut off by the next writer. A key stands for all that the clip depends on; a line of the same key counts
in place of one before. CRC-32 of its bytes tells a damaged clip.
"""

import fcntl
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from videogru.errors import DataError

ARRAY, INDEX = "features.f32", "index.jsonl"
_FLUSHED = 64  # clips that are written at once


@dataclass(frozen=True, slots=True)
class Entry:
    """One clip: steps `offset` to `offset + length` of the array, gaps before each of them; or why there is none."""

    key: str
    source: str
    content: str
    stamp: str
    offset: int = 0
    length: int = 0
    gaps: tuple[float, ...] = ()
    crc: int = 0
    error: str = ""


def read_index(folder: Path, step: tuple[int, int, int]) -> dict[str, Entry]:
    """The entries by key; lines that are cut short, or whose steps are not there, do not count.

    step: (D h w) of the array. Raises DataError where the index cannot be read.
    """
    entries: dict[str, Entry] = {}
    try:
        steps = _steps(folder, step)
        lines = (folder / INDEX).read_bytes().splitlines(keepends=True) if (folder / INDEX).is_file() else []
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=folder) from error
    for line in lines:
        try:
            values: dict[str, Any] = json.loads(line)
            entry = Entry(**{**values, "gaps": tuple(values.get("gaps", ()))})
        except (ValueError, TypeError):
            continue
        if not _is_sound(entry):
            continue
        if line.endswith(b"\n") and (entry.error or (entry.length >= 1 and 0 <= entry.offset <= steps - entry.length)):
            entries[entry.key] = entry
    return entries


def _is_sound(entry: Entry) -> bool:
    """Whether the values are of their types, and a gap stands before each step."""
    texts = (entry.key, entry.source, entry.content, entry.stamp, entry.error)
    whole = (entry.offset, entry.length, entry.crc)
    return (
        all(type(text) is str for text in texts)
        and all(type(number) is int for number in whole)
        and all(type(gap) in (int, float) and math.isfinite(gap) for gap in entry.gaps)
        and (bool(entry.error) or len(entry.gaps) == entry.length)
    )


def _steps(folder: Path, step: tuple[int, int, int]) -> int:
    path = folder / ARRAY
    return path.stat().st_size // (4 * int(np.prod(step))) if path.is_file() else 0


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """The features of a corpus's rows: of each row its entry, and the array (steps D h w) that it points into."""

    folder: Path
    step: tuple[int, int, int]
    entries: Mapping[int, Entry]
    array: NDArray[np.float32]

    def read(self, row: int) -> Float32[np.ndarray, "T D h w"]:
        """The features of a row that has no error. Raises DataError where they are damaged."""
        entry = self.entries[row]
        features = self.array[entry.offset : entry.offset + entry.length]
        if zlib.crc32(features.data) != entry.crc:
            raise DataError(
                f"the features of {entry.source} are damaged",
                where=self.folder / ARRAY,
                hint=f"Remove {self.folder} and encode again.",
            )
        return features


def mapped(folder: Path, step: tuple[int, int, int]) -> NDArray[np.float32]:
    """The array, mapped; empty where nothing was encoded."""
    steps = _steps(folder, step)
    if not steps:
        return np.empty((0, *step), np.float32)
    return np.memmap(folder / ARRAY, np.float32, "r", shape=(steps, *step))


class FeatureWriter:
    """Adds clips to a folder, which no other process may write to meanwhile.

    Raises DataError where another one does, or the folder cannot be written.
    """

    def __init__(self, folder: Path, step: tuple[int, int, int]) -> None:
        self.folder, self.step = folder, step
        try:
            self._lock = (folder / f".{INDEX}.lock").open("w", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError("another process is encoding here", where=folder, hint="Wait for it.") from None
        self.entries = read_index(folder, step)
        self._end = max((entry.offset + entry.length for entry in self.entries.values()), default=0)
        self._waiting: list[tuple[Entry, bytes]] = []
        try:
            self._array = self._opened(ARRAY, self._end * 4 * int(np.prod(step)))
            self._index = self._opened(INDEX, self._whole_bytes())
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, entry: Entry, features: Float32[np.ndarray, "T D h w"], gaps: NDArray[np.float32]) -> None:
        """Add a clip; offset, length, gaps and crc of its entry are filled in."""
        content = np.ascontiguousarray(features).tobytes()
        known = (entry.key, entry.source, entry.content, entry.stamp)
        told = tuple(float(gap) for gap in gaps)
        self._waiting.append((Entry(*known, self._end, len(features), told, zlib.crc32(content)), content))
        self._end += len(features)
        if len(self._waiting) >= _FLUSHED:
            self.flush()

    def fail(self, entry: Entry, reason: str) -> None:
        """Note why there are no features."""
        self._waiting.append((Entry(entry.key, entry.source, entry.content, entry.stamp, error=reason), b""))

    def flush(self) -> None:
        """Write what was added. Raises DataError where it cannot be."""
        waiting, self._waiting = self._waiting, []
        try:
            self._array.write(b"".join(content for _, content in waiting))
            self._array.flush()
            self._index.write(b"".join(_line(entry) for entry, _ in waiting))
            self._index.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self.entries |= {entry.key: entry for entry, _ in waiting}

    def close(self) -> None:
        """Let go of the folder; what was not flushed is lost."""
        for file in (self._array, self._index, self._lock):
            file.close()

    def _opened(self, name: str, size: int) -> IO[bytes]:
        """A file to append to, cut to `size` bytes."""
        path = self.folder / name
        path.touch()
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        return file

    def _whole_bytes(self) -> int:
        """Bytes of the index up to the end of its last whole line."""
        path = self.folder / INDEX
        return path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0

    def _unwritable(self, error: OSError) -> DataError:
        hint = "Make space or name another --out; the same command goes on."
        return DataError(f"cannot be written: {error.strerror or error}", where=self.folder, hint=hint)


def _line(entry: Entry) -> bytes:
    told: dict[str, Any] = {name: getattr(entry, name) for name in ("key", "source", "content", "stamp")}
    if entry.error:
        told["error"] = entry.error
    else:
        told |= {name: getattr(entry, name) for name in ("offset", "length", "gaps", "crc")}
    return json.dumps(told).encode() + b"\n"
