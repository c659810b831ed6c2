"""Prepared slices of volumes on disk, so that later epochs neither unpack nor resize.

The folder, its bound, the form of an entry and its checks are those of `frame_cache.py`; two things differ:

What is kept: all slices along `data.axis`, in their intensity window and resized to the encoder's square, as float32 of
one channel: the same bits as without the cache (4 * frame_size^2 bytes a slice; 36 MB for 180 slices at 224 pixels).

What names an entry: the content. It is a hash of the bytes of the scan's files, of the settings that shape a slice, of
the code that makes it and of the versions of what that uses. So a copy or a renamed file finds the entry, and a changed
byte does not, whatever size and times say. A process hashes a file once, and again when its path, inode, size, time of
change or of its inode's change is another; the last one cannot be set back by hand. A file that changed within the last
two seconds is hashed each time: two changes may share a tick of the clock.
"""

import hashlib
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from videogru.config import DataConfig
from videogru.data.loading.frame_cache import FrameCache
from videogru.data.readers.source import FrameSource
from videogru.kinds import Kind

_RECENT_SECONDS = 2.0
_BLOCK = 16  # slices prepared at a time
_SETTINGS = ("cache", "frame_size", "fit", "axis", "volume", "series", "intensity")
_ENDS = {
    "percentile": ("percentile_low", "percentile_high"),
    "window": ("window_low", "window_high"),
    "zscore": ("zscore_range",),
}
_PARTS = ("nibabel", "numpy", "torch")
_CODE = (
    "loading/volume_cache.py",
    "readers/dicom_files.py",
    "readers/volume/*.py",
    "clips/transforms.py",
)  # below videogru/data
_PAIRED = {".hdr": ".img", ".img": ".hdr"}


class VolumeCache(FrameCache):
    """Opens volumes through a folder of their prepared slices.

    data: resolved for volumes, with cache=raw. What `FrameCache` says of processes and of what is not cached holds.
    """

    kind: Kind = "volume"
    dtype: torch.dtype = torch.float32

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self.channels = 1
        self._hashed: dict[tuple[object, ...], str] = {}

    def settings(self) -> list[Any]:
        """What slices depend on besides their file: settings, code and versions."""
        names = (*_SETTINGS, *_ENDS[self.data.intensity])
        return ["volume", *(getattr(self.data, name) for name in names), _code(), *map(version, _PARTS)]

    def identity(self, path: Path) -> list[str]:
        """Names that say how files are read, and hashes of their bytes. Raises OSError where they cannot be read."""
        return [part for name, file in files_of(path) for part in (name, self._hash(file))]

    def frames(self, source: FrameSource) -> Iterator[torch.Tensor]:
        """All slices as the encoder gets them, in blocks (t 1 H W)."""
        count = len(source.positions)
        for start in range(0, count, _BLOCK):
            yield self.prepared(source, range(start, min(start + _BLOCK, count)))

    def _hash(self, file: Path) -> str:
        facts = file.stat()
        known = (str(file.absolute()), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        found = self._hashed.get(known)
        if found is None:
            recent = abs(time.time() - max(facts.st_mtime, facts.st_ctime)) < _RECENT_SECONDS
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if not recent:
                self._hashed[known] = found
        return found


def files_of(path: Path) -> list[tuple[str, Path]]:
    """The files that a volume's voxels come from, each with what of its name matters: all of a folder, both of a pair.

    Raises OSError where a folder cannot be listed.
    """
    if path.is_dir():
        return sorted((str(file.relative_to(path)), file) for file in path.rglob("*") if file.is_file())
    name = path.name.lower()
    packed = ".gz" if name.endswith(".gz") else ""
    stem = path.name[: len(path.name) - len(packed)]
    suffix = Path(stem).suffix
    found = [(suffix.lower() + packed, path)]
    other = _PAIRED.get(suffix.lower())
    if other is not None:
        beside = [path.with_name(stem[: -len(suffix)] + end) for end in (other, other + ".gz", other.upper())]
        found += [(file.name[len(stem) - len(suffix) :].lower(), file) for file in beside if file.is_file()]
    return sorted(found)


def _code() -> str:
    """A hash of the modules that turn a file into prepared slices."""
    data = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for file in sorted({file for pattern in _CODE for file in data.glob(pattern)}):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
