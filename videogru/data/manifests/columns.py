"""Columns of text that millions of rows fit into, and that worker processes share instead of copying.

  texts    "a/1.mp4", "b/2.mp4"       blob     a/1.mp4b/2.mp4        one buffer, UTF-8
                                      offsets  0      7      14      int64, one more than texts
  groups   "p1", "p2", "p1"           names    "p1", "p2"            codes  0 1 0   int32

A NumPy column of fixed-width str takes 4 bytes for each character of its longest text; a list of str takes an object
for each, whose reference count a worker writes to. These are three plain buffers. A forked worker never writes to
them; to a spawned one they are handed over as a mapped file instead of through a pipe.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Codec = tuple[str, str]
# File names that are no text reach Python as lone surrogates; this keeps them, and sorts as Python does.
_CODEC: Codec = ("utf-8", "surrogatepass")
_SHARED_BYTES = 2**20  # smaller arrays are cheaper to pickle
CHUNK_ROWS = 2**18  # rows that are spread out as Python or Arrow values at a time


class Text(Sequence[str]):
    """(N,) texts in one buffer; reads like a sequence of str, and `np.asarray` spreads it out.

    blob: (bytes,) uint8; offsets: (N + 1,) int64, from 0 on, not decreasing. Raises ValueError where they do not fit.
    """

    __slots__ = ("blob", "offsets")

    def __init__(self, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(blob):
            raise ValueError("offsets must run from 0 to the end of the blob")
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, texts: "Text | Coded | Iterable[str]") -> "Text":
        """Any texts as such a column; one that is a Text already is returned itself."""
        if isinstance(texts, Text):
            return texts
        if isinstance(texts, Coded):
            return texts.names[texts.codes]
        encoded = [text.encode(*_CODEC) for text in (texts.tolist() if isinstance(texts, np.ndarray) else texts)]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @classmethod
    def of_arrow(cls, array: Any) -> "Text":
        """A column of an Arrow array or chunked array of strings or binary without nulls; Arrow's memory is copied."""
        chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
        parts, ends = [], [np.zeros(1, np.int64)]
        total = 0
        for chunk in chunks:
            if not len(chunk):
                continue
            wide = pa.types.is_large_string(chunk.type) or pa.types.is_large_binary(chunk.type)
            _, marks, blob = chunk.buffers()
            offsets = np.frombuffer(marks, np.int64 if wide else np.int32)[chunk.offset :][: len(chunk) + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            if last > first:
                parts.append(np.frombuffer(blob, np.uint8)[first:last])
            ends.append(offsets[1:].astype(np.int64) + (total - first))
            total += last - first
        return cls(np.concatenate(parts) if parts else np.empty(0, np.uint8), np.concatenate(ends))

    def arrow(self, start: int = 0, stop: int | None = None) -> Any:
        """Rows start..stop as an Arrow array of large_binary over the same memory."""
        stop = len(self) if stop is None else min(stop, len(self))
        offsets = self.offsets[start : stop + 1]
        buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(self.blob)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), stop - start, buffers)

    def chunks(self) -> Iterator[tuple[int, Any]]:
        """(first row, Arrow array) of a bounded number of rows at a time."""
        for start in range(0, len(self), CHUNK_ROWS):
            yield start, self.arrow(start, start + CHUNK_ROWS)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int]:
        """(N,), as an array has it."""
        return (len(self),)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.blob.nbytes + self.offsets.nbytes

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: "slice | NDArray[Any] | list[int]") -> "Text": ...
    def __getitem__(self, index: Any) -> "str | Text":
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        if (isinstance(index, np.ndarray) and index.ndim) or isinstance(index, list):
            return self._take(np.asarray(index, np.int64 if len(index) == 0 else None))
        row = int(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return bytes(self.blob[self.offsets[row] : self.offsets[row + 1]]).decode(*_CODEC)

    def _take(self, index: NDArray[Any]) -> "Text":
        rows = np.flatnonzero(index) if index.dtype == np.bool_ else index
        if len(rows) and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)}")
        return Text.of_arrow(self.arrow().take(pa.array(np.where(rows < 0, rows + len(self), rows))))

    def __iter__(self) -> Iterator[str]:
        for _, chunk in self.chunks():
            yield from (text.decode(*_CODEC) for text in chunk.to_pylist())

    def tolist(self) -> list[str]:
        """All texts as Python objects."""
        return list(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.tolist(), dtype=np.str_ if dtype is None else dtype)

    def __eq__(self, other: object) -> Any:
        return NotImplemented  # by row, as arrays do, or as a whole: say which

    __hash__ = None  # type: ignore[assignment]

    def same(self, other: "Text") -> bool:
        """All texts are equal, in order."""
        if self is other:
            return True
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.blob, other.blob)

    def __reduce__(self) -> tuple[object, ...]:
        return Text, (hand_over(self.blob), hand_over(self.offsets))

    def __repr__(self) -> str:
        return f"Text({len(self)} texts, {self.nbytes} bytes)"


class Coded(Sequence[str]):
    """(N,) texts of which many are equal: codes (N,) int32 into `names`, which differ from each other.

    Reads like a sequence of str; some names may belong to no row. Raises ValueError where a code has no name.
    """

    __slots__ = ("codes", "names")

    def __init__(self, codes: NDArray[np.int32], names: Text) -> None:
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < len(names):
            raise ValueError(f"codes must lie in 0..{len(names) - 1}")
        self.codes, self.names = codes, names

    @classmethod
    def of(cls, texts: "Coded | Text | Iterable[str]") -> "Coded":
        """Any texts as such a column; where they all differ, a Text itself holds the names."""
        if isinstance(texts, Coded):
            return texts
        column = Text.of(texts)
        encoded = column.arrow().dictionary_encode()
        if len(encoded.dictionary) == len(column):
            return cls(np.arange(len(column), dtype=np.int32), column)
        return cls(encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32), Text.of_arrow(encoded.dictionary))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int]:
        """(N,), as an array has it."""
        return (len(self),)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: "slice | NDArray[Any] | list[int]") -> "Coded": ...
    def __getitem__(self, index: Any) -> "str | Coded":
        chosen = self.codes[index]
        return Coded(chosen, self.names) if isinstance(chosen, np.ndarray) and chosen.ndim else self.names[int(chosen)]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield from self.names[self.codes[start : start + CHUNK_ROWS]]

    def tolist(self) -> list[str]:
        """All texts as Python objects."""
        return list(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.tolist(), dtype=np.str_ if dtype is None else dtype)

    def __eq__(self, other: object) -> Any:
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def is_column(self, texts: Text) -> bool:
        """Each row has the text of the same row of `texts`."""
        if len(self) != len(texts):
            return False
        if self.names is texts and np.array_equal(self.codes, np.arange(len(self))):
            return True
        return all(
            self.names[self.codes[start : start + CHUNK_ROWS]].same(texts[start : start + CHUNK_ROWS])
            for start in range(0, len(self), CHUNK_ROWS)
        )

    def distinct(self) -> int:
        """How many different texts the rows have."""
        return int(np.count_nonzero(np.bincount(self.codes, minlength=len(self.names))))

    def ranks(self) -> tuple[NDArray[np.int64], int]:
        """(N,) each row's place among the different texts in Python's order, and how many these are."""
        used = np.bincount(self.codes, minlength=len(self.names)) > 0
        order = np.asarray(pc.array_sort_indices(self.names.arrow()))
        order = order[used[order]]
        rank = np.zeros(len(self.names), np.int64)
        rank[order] = np.arange(len(order))
        return rank[self.codes], len(order)

    def __reduce__(self) -> tuple[object, ...]:
        return Coded, (hand_over(self.codes), self.names)

    def __repr__(self) -> str:
        return f"Coded({len(self)} rows, {len(self.names)} names)"


# Handing over ---------------------------------------------------------------------------------------------------


class _File:
    """An unlinked temporary file with an array's bytes; a spawned process gets its descriptor and maps it."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        array.tofile(self.file)
        self.file.flush()
        self.dtype, self.shape = array.dtype.str, array.shape


class _Handed:
    def __init__(self, held: _File) -> None:
        self.held = held

    def __reduce__(self) -> tuple[object, ...]:
        return _map, (DupFd(self.held.file.fileno()), self.held.dtype, self.held.shape)


_files: dict[int, _File] = {}


def hand_over(array: NDArray[Any]) -> Any:
    """What to pickle for an array: for a process that is being spawned, a large one becomes a file that it maps.

    All processes map the same file, whose pages the system holds once. It is written once for each array, to the
    system's folder for temporary files, and vanishes with the processes that use it. Any other pickle, and any on
    Windows, holds the array itself.
    """
    if get_spawning_popen() is None or os.name != "posix" or array.nbytes < _SHARED_BYTES:
        return array
    key = id(array)
    if key not in _files:
        _files[key] = _File(array)
        weakref.finalize(array, _forget, key)
    return _Handed(_files[key])


def _forget(key: int) -> None:
    _files.pop(key).file.close()


def _map(handle: Any, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    descriptor = handle.detach()
    try:
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, np.dtype(dtype)).reshape(shape)
