"""Decoded frames on disk, so that later epochs read clips without decoding video.

An entry holds all frames of one video as the encoder gets them (channels, square, uint8), so that sampling and
augmentation still draw anew in each epoch, and the positions they draw from:

  magic, CRC-32 of what follows up to the frames, length of the JSON, T
  JSON                 key, form, shape (T C H W), unit, extent, details
  positions            (T,) float64
  sizes, checksums     (T,) uint64, (T,) uint32: bytes and CRC-32 of each frame
  frames               raw (C H W), or JPEG, one after the other

Its name is a hash of what the frames depend on: the file (path, size, time of change), decoder, size, fit, channels,
and the versions of what computes them. Entries appear whole, by renaming. Whatever does not check is made anew. Frames
are read, not mapped: a file that somebody cuts short ends a mapping process. `volume_cache.py` does the same.

The folder has a bound. Once it is reached, nothing more is added and nothing is thrown out: an epoch reads every video
once, so the least recently used would always be thrown out just before its turn.
"""

import hashlib
import io
import json
import os
import struct
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image

from videogru.config import DataConfig
from videogru.data.clips.transforms import fit_frames, to_channels
from videogru.data.readers.open import open_source
from videogru.data.readers.source import FrameSource
from videogru.errors import ConfigError, SourceError
from videogru.kinds import Kind, Unit
from videogru.resources import data_root

MAX_ENTRY_BYTES = 512 * 2**20  # of frames as uint8: 14,000 at 112 pixels, 3,500 at 224; longer videos are not cached
JPEG_QUALITY = 95
_MAGIC = b"vgruFC01"
_HEAD = struct.Struct("<8sIQQ")  # magic, CRC-32 of JSON and tables, bytes of JSON, frames
_ROW_BYTES = 8 + 8 + 4  # of the three tables
_BLOCK_BYTES = 256 * 2**20  # decoded at a time
_STALE_SECONDS = 3600.0  # after which an unfinished entry belongs to a process that was killed
_SETTINGS = ("cache", "decoder", "frame_size", "fit", "channels", "folder_fps")  # that shape the frames
_PARTS = ("av", "torch", "pillow")
_crc32 = isal_zlib.crc32  # equal to zlib's, and faster


class FrameCache:
    """Opens videos through a folder of their decoded frames.

    data: resolved for video, with cache other than none. Any number of processes may use one folder. A video that
    cannot be cached (too long, partly unreadable, stamps that change while reading, no room) is opened as without.
    """

    kind: Kind = "video"
    dtype: torch.dtype = torch.uint8

    def __init__(self, data: DataConfig) -> None:
        assert data.channels is not None and data.fit is not None and data.cache != "none"
        check_cache(data)
        self.data = data
        self.folder = cache_folder(data)
        self.limit_bytes = int(data.cache_gib * 2**30)
        self.channels: int = data.channels  # of a kept frame
        self._how = json.dumps([*self.settings(), _MAGIC.decode()])
        self._refused: set[str] = set()
        self._full = self._counted = False

    def settings(self) -> list[Any]:
        """What frames depend on besides their file, as plain values: settings and versions."""
        data = self.data
        parts = [*_PARTS, data.decoder] if data.decoder in ("decord", "torchcodec") else _PARTS
        return [getattr(data, name) for name in _SETTINGS] + [JPEG_QUALITY, *(version(part) for part in parts)]

    def open(self, path: Path) -> FrameSource:
        """The source at `path`; raises as `open_source` does."""
        entry = self.entry_of(path)
        if entry is None:
            return open_source(path, data=self.data, kind=self.kind)
        key = entry.stem
        cached = self._load(entry, path)
        if cached is not None:
            return cached
        source = open_source(path, data=self.data, kind=self.kind)
        if self._full or key in self._refused:
            return source
        try:
            filled = self._fill(entry, source)
        except _Untouched:
            self._refused.add(key)
            return source
        except SourceError:
            filled = False  # clips of what can be read may still be
        except OSError as error:
            warnings.warn(f"no more frames are cached in {self.folder}: {error}", stacklevel=2)
            filled, self._full = False, True
        source.close()
        if not filled:
            self._refused.add(key)
        return self._load(entry, path) or open_source(path, data=self.data, kind=self.kind)

    def entry_of(self, path: Path) -> Path | None:
        """Where the frames of a file lie, or would; None where the file cannot be looked at."""
        try:
            parts = self.identity(path)
        except (OSError, ValueError):
            return None
        key = hashlib.sha256("\0".join([self._how, *parts]).encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / key[:2] / f"{key}.frames"

    def identity(self, path: Path) -> list[str]:
        """What stands for the content of a file or folder. Raises OSError where it cannot be looked at."""
        facts = path.stat()
        parts = [str(path.absolute()), str(facts.st_size), str(facts.st_mtime_ns)]
        if path.is_dir():
            with os.scandir(path) as entries:
                found = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries)
            parts.append(repr(found))
        return parts

    def _load(self, entry: Path, path: Path) -> "CachedFrames | None":
        """The entry, opened; None where there is none, or where it was damaged and is now gone."""
        try:
            descriptor = os.open(entry, os.O_RDONLY)
        except OSError:
            return None
        try:
            index = _read_index(descriptor, entry.stem)
            if index.facts["shape"][1:] != [self.channels, self.data.frame_size, self.data.frame_size]:
                raise ValueError("another size")
            return CachedFrames(path, entry, descriptor, index, self)
        except (ValueError, KeyError, TypeError, OSError):
            os.close(descriptor)
            self.drop(entry)
            return None

    def drop(self, entry: Path) -> None:
        """Remove a damaged or unfinished entry."""
        with self._locked() as room:
            room.used -= entry.stat().st_size if entry.exists() else 0
            entry.unlink(missing_ok=True)

    def _fill(self, entry: Path, source: FrameSource) -> bool:
        """Decode all frames into an entry; False where there is none then.

        Raises _Untouched where that is clear before anything is read, SourceError where a frame cannot be.
        """
        count, size, channels = len(source.positions), self.data.frame_size, self.channels
        index, frame_bytes = source.positions, channels * size * size * self.dtype.itemsize
        if count * frame_bytes > MAX_ENTRY_BYTES:
            raise _Untouched
        facts = {
            "key": entry.stem,
            "shape": [count, channels, size, size],
            "unit": source.unit,
            "extent": list(source.extent),
            "details": source.details,
        }
        text = json.dumps(facts).encode()
        start = _HEAD.size + len(text) + count * _ROW_BYTES
        part = entry.with_name(f"{entry.stem}.{os.getpid()}-{threading.get_ident()}.part")
        entry.parent.mkdir(parents=True, exist_ok=True)
        raw = self.data.cache == "raw"
        try:
            if raw and not self._reserve(part, start + count * frame_bytes):
                raise _Untouched
            contents: list[bytes] = []
            sizes: list[int] = []
            checksums: list[int] = []
            for frames in self.frames(source):
                block = [frame.contiguous().numpy().tobytes() if raw else _to_jpeg(frame) for frame in frames]
                sizes += [len(content) for content in block]
                checksums += [_crc32(content) for content in block]
                if raw:
                    _write(part, b"".join(block), start + sum(sizes) - sum(map(len, block)))
                else:
                    contents += block
            if self.entry_of(source.path) != entry:  # changed meanwhile
                return False
            if source.positions is not index or (not raw and not self._reserve(part, start + sum(sizes))):
                return False
            tables = b"".join(
                np.array(*column).tobytes() for column in ((index, "<f8"), (sizes, "<u8"), (checksums, "<u4"))
            )
            _write(part, b"".join(contents), start)
            _write(part, _HEAD.pack(_MAGIC, _crc32(text + tables), len(text), count) + text + tables, 0)
            with self._locked() as room:
                room.used -= entry.stat().st_size if entry.exists() else 0  # another process was faster
                part.replace(entry)
            return True
        finally:
            if part.exists():
                self.drop(part)

    def frames(self, source: FrameSource) -> Iterator[torch.Tensor]:
        """All frames as the encoder gets them, in blocks (t C H W)."""
        pixels = int(str(source.details.get("width", 1920))) * int(str(source.details.get("height", 1080)))
        step, count = max(1, _BLOCK_BYTES // (3 * pixels)), len(source.positions)
        for start in range(0, count, step):
            yield self.prepared(source, range(start, min(start + step, count)))

    def prepared(self, source: FrameSource, indices: Sequence[int]) -> torch.Tensor:
        """The frames at increasing `indices` as the encoder gets them (t C H W)."""
        data = self.data
        assert data.fit is not None
        frames = to_channels(source.read(indices), self.channels)
        return fit_frames(frames, size=data.frame_size, fit=data.fit, pixel_aspect=source.pixel_aspect)

    def _reserve(self, part: Path, size: int) -> bool:
        """Make a file of that size, if there is room for it."""
        with self._locked() as room:
            if not self._counted:
                room.used = self._count()
                self._counted = True
            if room.used + size > self.limit_bytes:
                self._full = True
                return False
            with part.open("xb") as file:
                file.truncate(size)
            room.used += size
            return True

    def _count(self) -> int:
        """Bytes of all entries; unfinished ones of killed processes are removed."""
        total = 0
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                facts = path.stat()
                if path.suffix == ".part" and time.time() - facts.st_mtime > _STALE_SECONDS:
                    path.unlink(missing_ok=True)
                else:
                    total += facts.st_size
        return total

    @contextmanager
    def _locked(self) -> Iterator["_Room"]:
        """The bytes in use, while no other process counts them."""
        import fcntl

        with (self.folder / "used_bytes").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read(32)
            room = _Room(int(content) if content.isdigit() else 0)
            yield room
            file.truncate(0)
            file.write(str(max(0, room.used)).encode())
            file.flush()


class _Untouched(Exception):
    """An entry cannot be made; the source was not read yet."""


@dataclass
class _Room:
    used: int  # bytes


def _write(path: Path, content: bytes, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


class _Index(NamedTuple):
    facts: dict[str, Any]
    positions: NDArray[np.float64]
    offsets: NDArray[np.int64]
    checksums: NDArray[np.uint32]


def _read_index(descriptor: int, key: str) -> _Index:
    """What an entry holds besides its frames. Raises ValueError, KeyError or TypeError where it is damaged."""
    total = os.fstat(descriptor).st_size
    magic, checksum, length, count = _HEAD.unpack(_exactly(descriptor, _HEAD.size, 0))
    start = _HEAD.size + length + count * _ROW_BYTES
    if magic != _MAGIC or not count or start > total:
        raise ValueError("no entry")
    content = _exactly(descriptor, start - _HEAD.size, _HEAD.size)
    if _crc32(content) != checksum:
        raise ValueError("damaged")
    facts = json.loads(content[:length])
    sizes = np.frombuffer(content, "<u8", count, length + count * 8).astype(np.int64)
    offsets = start + np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    if facts["key"] != key or facts["shape"][0] != count or offsets[-1] != total:
        raise ValueError("not this entry, or cut short")
    positions = np.frombuffer(content, "<f8", count, length).copy()
    return _Index(facts, positions, offsets, np.frombuffer(content, "<u4", count, length + count * 16))


def _exactly(descriptor: int, size: int, offset: int) -> bytes:
    content = os.pread(descriptor, size, offset)
    if len(content) != size:
        raise ValueError("cut short")
    return content


class CachedFrames:
    """A `FrameSource` over an entry: (T C H W) of the encoder's size, which `prepare_clip` leaves as they are."""

    def __init__(self, path: Path, entry: Path, descriptor: int, index: _Index, cache: FrameCache) -> None:
        self.path, self.kind = path, cache.kind
        self._entry, self._descriptor, self._index, self._cache = entry, descriptor, index, cache
        facts = index.facts
        self.unit: Unit = facts["unit"]
        start, end = facts["extent"]
        self.extent = (float(start), float(end))
        self.positions = index.positions
        self.pixel_aspect = 1.0
        self.details: dict[str, object] = {**facts["details"], "access": f"cached as {cache.data.cache}"}
        _, channels, height, width = facts["shape"]
        self._shape: tuple[int, int, int] = (channels, height, width)
        self._raw = cache.data.cache == "raw"

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at increasing `indices` (T C H W); damaged ones come from the file itself instead."""
        chosen = [int(index) for index in indices]
        if self._descriptor < 0:
            raise ValueError(f"{self.path} is closed")
        clip = torch.empty((len(chosen), *self._shape), dtype=self._cache.dtype)
        try:
            for step, index in enumerate(chosen):
                self._read_into(clip[step], index)
        except (ValueError, OSError, SyntaxError):  # Pillow's word for broken files is SyntaxError
            self._cache.drop(self._entry)
            with open_source(self.path, data=self._cache.data, kind=self.kind) as source:
                return self._cache.prepared(source, chosen)
        return clip

    def _read_into(self, frame: torch.Tensor, index: int) -> None:
        offsets = self._index.offsets
        size = int(offsets[index + 1] - offsets[index])
        if self._raw:
            buffer = frame.numpy().reshape(-1).view(np.uint8)
            if size != buffer.nbytes or os.preadv(self._descriptor, [buffer.data], int(offsets[index])) != size:
                raise ValueError("cut short")
            content: Any = buffer
        else:
            content = _exactly(self._descriptor, size, int(offsets[index]))
        if _crc32(content) != int(self._index.checksums[index]):
            raise ValueError("damaged")
        if not self._raw:
            frame.copy_(_from_jpeg(content, self._shape))

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "CachedFrames":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _to_jpeg(frame: torch.Tensor) -> bytes:
    """(C H W) uint8 as JPEG with full-size color planes, as scaled-down frames have."""
    pixels = frame[0].numpy() if len(frame) == 1 else frame.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _from_jpeg(content: bytes, shape: tuple[int, int, int]) -> torch.Tensor:
    channels, height, width = shape
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        if image.size != (width, height) or image.mode != ("L" if channels == 1 else "RGB"):
            raise ValueError("another size")
        pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def cache_folder(data: DataConfig) -> Path:
    """Where the frames lie: data.cache_dir, else frame-cache/ in the folder of data sets."""
    return data.cache_dir or data_root() / "frame-cache"


def check_cache(data: DataConfig) -> None:
    """Raises ConfigError where the cache cannot be written to; before the work, not in a worker process."""
    if data.cache == "none":
        return
    folder = cache_folder(data)
    try:
        import fcntl  # noqa: F401

        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "used_bytes").open("a+b"):
            pass
    except (OSError, ImportError) as error:
        hint = "Name another folder: --set data.cache_dir=FOLDER, or leave the cache out: --set data.cache=none"
        raise ConfigError(f"frames cannot be cached there ({error})", where=folder, hint=hint) from error
