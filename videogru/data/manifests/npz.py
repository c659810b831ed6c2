"""Arrays of a .npz file, of which nothing is believed before it is checked."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from videogru.errors import DataError

_MAX_BYTES = 8 * 2**30
_DEFLATE_RATIO = 1032  # no deflate stream expands further


def read_npz(path: Path, names: list[str]) -> dict[str, NDArray]:
    """The named arrays, never pickles; what the headers claim is checked before anything is allocated.

    Raises DataError where an array is missing, the file is damaged or claims too much.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = 0
            for info in archive.infolist():
                claimed += info.file_size
                if info.file_size > _DEFLATE_RATIO * (info.compress_size + 1) or claimed > _MAX_BYTES:
                    raise DataError(f"{info.filename} claims {info.file_size} bytes, too many", where=path)
            for name in names:
                _check_header(archive, f"{name}.npy")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except KeyError as error:
        raise DataError(f"misses an array: {error.args[0]}", where=path) from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot be read as .npz: {error}", where=path) from error


def _check_header(archive: zipfile.ZipFile, name: str) -> None:
    """Raise ValueError where an array's header claims more bytes than its member has."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as member:
        major = np.lib.format.read_magic(member)[0]
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"shape {shape} of {dtype} does not fit into {size} bytes")
