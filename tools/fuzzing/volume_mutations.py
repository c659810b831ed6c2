"""Small scans of many forms, and seeded ways to damage them; what `fuzz_volumes.py` feeds on."""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Larger ones take too long to be read a hundred times.
LARGEST_BYTES = 250_000
NAMES = (
    "nibabel/anatomical.nii", "nibabel/standard.nii.gz", "nibabel/example_nifti2.nii.gz", "nibabel/test.mgz",
    "nibabel/functional.nii", "nifti_rs/27/int16.nii", "nifti_rs/27/float32.nii", "nifti_rs/27/float64.nii",
    "nifti_rs/27/uint64.nii", "nifti_rs/27/int8.nii", "nifti_rs/minimal.hdr", "nifti_rs/minimal.nii",
    "nifti_rs/zstat1.nii.gz", "dipy/aniso_vox.nii.gz", "dipy/small_25.nii.gz",
)  # fmt: skip
# What of NIfTI-1 is damaged on purpose: first byte, number type, how many. NIfTI-2's are elsewhere, MGH's too.
_FIELDS = {
    1: {"dims": (40, "i2", 8), "datatype": (70, "i2", 2), "offset": (108, "f4", 1), "slope": (112, "f4", 2),
        "affine": (252, "i2", 2), "rows": (280, "f4", 12), "spacing": (76, "f4", 8)},
    2: {"dims": (16, "i8", 8), "datatype": (12, "i2", 2), "offset": (168, "i8", 1), "slope": (176, "f8", 2),
        "affine": (344, "i4", 2), "rows": (400, "f8", 12), "spacing": (104, "f8", 8)},
    0: {"dims": (4, ">i4", 4), "datatype": (20, ">i4", 1), "offset": (0, ">i4", 1), "slope": (24, ">i4", 1),
        "affine": (28, ">i2", 1), "rows": (42, ">f4", 12), "spacing": (30, ">f4", 3)},
}  # fmt: skip
_VALUES = (0, 1, -1, 2, 3, 4, 8, 16, 64, 127, 255, 256, 512, 768, 1024, 2304, 32767, -32768, 2**31 - 1, -(2**31))
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, -1e30, 348.0, 352.0, 1e9, float("nan"), float("inf"), -float("inf"))
MUTATIONS = (
    "header", "dims", "datatype", "offset", "slope", "affine", "rows", "spacing", "body", "truncate", "zeros",
    "delete", "repeat", "gzip-flip", "gzip-truncate", "gzip-trailer", "gzip-body", "gzip-more",
)  # fmt: skip


class Base(NamedTuple):
    """A sound scan: what it holds, unpacked; pair: the bytes of its .img, empty where it is one file."""

    name: str
    content: bytes
    pair: bytes

    @property
    def packed(self) -> bool:
        """Whether it is a gzip stream."""
        return self.name.endswith((".gz", ".mgz"))

    def write(self, folder: Path) -> Path:
        """The sound files in a folder; returns what is to be opened."""
        return _write(folder, self.name, gzip.compress(self.content, 1) if self.packed else self.content, self.pair)


def collect_bases(volumes: Path) -> dict[str, Base]:
    """Small real scans of each form, by name."""
    found: dict[str, Base] = {}
    for name in NAMES:
        path = volumes / name
        if not path.is_file() or path.stat().st_size > LARGEST_BYTES:
            continue
        content = path.read_bytes()
        pair = path.with_suffix(".img").read_bytes() if path.suffix == ".hdr" else b""
        found[name] = Base(path.name, gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content, pair)
    return found


def mutate(base: Base, kind: str, generator: np.random.Generator, folder: Path) -> Path:
    """Write the scan with one kind of damage into a folder; returns what is to be opened.

    gzip-...: the packed stream is damaged. Others: the content, which is packed again with a checksum that fits.
    """
    if kind.startswith("gzip"):
        return _write(folder, base.name, _damaged_stream(base.content, kind, generator), base.pair)
    content, pair = bytearray(base.content), bytearray(base.pair)
    form = 0 if base.name.endswith(".mgz") else 2 if content[:4] == (540).to_bytes(4, "little") else 1
    head = {0: 284, 1: 348, 2: 540}[form]
    target = pair or content
    start = 0 if pair else head
    if kind == "header":
        for place in generator.integers(0, min(head, len(content)), int(2 ** generator.integers(0, 5))):
            content[place] ^= 1 << int(generator.integers(0, 8))
    elif kind in _FIELDS[form]:
        place, dtype, count = _FIELDS[form][kind]
        # Big-endian headers of NIfTI begin with a zero.
        wide = np.dtype(dtype if form == 0 or content[0] else f">{dtype}")
        for _ in range(int(generator.integers(1, 3))):
            at = place + wide.itemsize * int(generator.integers(0, count))
            values = _REALS if wide.kind == "f" else _VALUES
            value = values[int(generator.integers(0, len(values)))]
            limits = np.iinfo(wide) if wide.kind == "i" else None
            fitting = max(limits.min, min(limits.max, int(value))) if limits else value
            with np.errstate(over="ignore"):
                content[at : at + wide.itemsize] = np.array(fitting).astype(wide).tobytes()
    elif kind == "body":
        for place in generator.integers(start, len(target), int(2 ** generator.integers(0, 7))):
            target[place] ^= 1 << int(generator.integers(0, 8))
    elif kind == "truncate":
        del target[int(generator.integers(0, len(target))) :]
    else:
        first = int(generator.integers(0, len(target)))
        last = min(len(target), first + int(generator.integers(1, max(2, len(target) // 4))))
        if kind == "zeros":
            target[first:last] = bytes(last - first)
        elif kind == "delete":
            del target[first:last]
        elif kind == "repeat":
            target[first:first] = target[first:last]
        else:
            raise ValueError(f"unknown mutation {kind!r}")
    whole = bytes(content)
    return _write(folder, base.name, gzip.compress(whole, 1) if base.packed else whole, bytes(pair))


def _damaged_stream(content: bytes, kind: str, generator: np.random.Generator) -> bytes:
    stream = bytearray(gzip.compress(content, int(generator.integers(1, 10)), mtime=0))
    if kind == "gzip-flip":
        for place in generator.integers(0, len(stream), int(2 ** generator.integers(0, 5))):
            stream[place] ^= 1 << int(generator.integers(0, 8))
    elif kind == "gzip-truncate":
        del stream[int(generator.integers(0, len(stream))) :]
    elif kind == "gzip-trailer":  # the checksum and the length
        stream[-int(generator.integers(1, 9))] ^= 1 << int(generator.integers(0, 8))
    elif kind == "gzip-body":  # other bytes under the checksum of the sound ones
        other = bytearray(content)
        for place in generator.integers(0, len(other), int(2 ** generator.integers(0, 4))):
            other[place] ^= 1 << int(generator.integers(0, 8))
        changed = gzip.compress(bytes(other), 1)
        return changed[:-8] + bytes(stream[-8:])
    elif kind == "gzip-more":  # zeros, a second member, or rubbish after the end
        more = (bytes(100), gzip.compress(bytes(2**20)), generator.bytes(50))
        stream += more[int(generator.integers(0, 3))]
    else:
        raise ValueError(f"unknown mutation {kind!r}")
    return bytes(stream)


def _write(folder: Path, name: str, content: bytes, pair: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    if pair:
        path.with_suffix(".img").write_bytes(pair)
    return path
