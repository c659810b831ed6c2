"""The stored numbers of a volume's file, in one pass: into one buffer of the claimed size, up to the checksum.

nibabel reads a gzip stream only as far as the voxels reach, so that neither its checksum nor its length is looked at: a
flipped bit passes as an intensity. Here the same pass goes on to the end of the stream. ISA-L (python-isal) unpacks
about twice as fast as zlib; it checks the CRC-32 and the length of each gzip member as `gzip` does.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip
from numpy.typing import NDArray

from videogru.errors import SourceError

# What may follow the voxels (scanner notes, the tags of an MGZ); a stream that goes on for longer is a bomb or has a
# header that claims too little.
MAX_TRAILER_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
ByteStream = io.RawIOBase | io.BufferedIOBase


def read_voxels(image: Any) -> NDArray[Any]:
    """The stored numbers of a nibabel image whose claims were checked, in its shape and number type, unscaled.

    Raises SourceError where a compressed file goes on for more than 64 MiB after its voxels; EOFError, OSError or
    zlib.error where the file ends before its claim or a compressed one is damaged anywhere.
    """
    proxy = image.dataobj
    shape, dtype = tuple(int(side) for side in proxy.shape), np.dtype(proxy.dtype)
    voxels = image.file_map["image"].filename
    flat = np.empty(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    with open_bytes(voxels) as stream:
        _skip(stream, int(proxy.offset))
        _fill(stream, flat)
        if is_packed(voxels):
            _read_to_end(stream, Path(voxels))
    for holder in image.file_map.values():
        if holder.filename is not None and holder.filename != voxels and is_packed(holder.filename):
            with open_bytes(holder.filename) as stream:
                _read_to_end(stream, Path(holder.filename))
    found: NDArray[Any] = flat.view(dtype).reshape(shape, order=proxy.order)
    return found


def is_packed(name: str | Path) -> bool:
    """Whether a file of that name is a gzip stream, as nibabel decides it."""
    return str(name).lower().endswith((".gz", ".mgz"))


def open_bytes(name: str | Path) -> ByteStream:
    """The file's bytes, unpacked where it is a gzip stream."""
    # Else unbuffered: it is read into the caller's buffer.
    return igzip.open(str(name), "rb") if is_packed(name) else io.FileIO(name)


def _skip(stream: ByteStream, count: int) -> None:
    while count > 0:
        got = len(stream.read(min(count, _CHUNK_BYTES)))
        if not got:
            raise EOFError("it ends before its voxels")
        count -= got


def _fill(stream: ByteStream, flat: NDArray[np.uint8]) -> None:
    view, filled = flat.data, 0
    while filled < len(view):
        got = stream.readinto(view[filled : filled + _CHUNK_BYTES])
        if not got:  # None or 0
            raise EOFError(f"it ends after {filled} of {len(view)} bytes of voxels")
        filled += got


def _read_to_end(stream: ByteStream, path: Path) -> None:
    left = MAX_TRAILER_BYTES
    while chunk := stream.read(_CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            raise SourceError(
                f"goes on for more than {MAX_TRAILER_BYTES >> 20} MiB after its voxels",
                where=path,
                hint="Its header claims too little, or it is no honest scan; save it again.",
            )
