"""Scans by nibabel: NIfTI-1 and -2 (one file or .hdr/.img), MGH/MGZ, Analyze. Headers are checked before they count."""

import io
import struct
import warnings
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.readers.volume.memory import check_memory
from videogru.data.readers.volume.scan import Scan
from videogru.errors import SourceError

# DEFLATE cannot shrink data by more than this (zlib's technical notes, "Maximum Compression Factor").
MAX_GZIP_RATIO = 1032
# Header extensions, and what may follow the voxels (tags of MGH, padding).
MAX_EXTRA_BYTES = 64 * 2**20
# sform and qform are float32, and the quaternion loses some more: below this they mean the same.
MAX_DISAGREEMENT_MM = 0.1
_CHUNK_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
_PLAIN = tuple(struct.pack(f"{order}i", size) for size in (348, 540) for order in "<>")  # how NIfTI headers begin
ByteStream = io.BufferedIOBase  # as igzip opens them: ISA-L unpacks about twice as fast as zlib, and checks the same
_IMAGES = (nib.Nifti1Pair, nib.Nifti2Pair, nib.MGHImage, nib.AnalyzeImage)
# xyzt_units & 7 of NIfTI; 2 is mm, and 0, not said, is taken for it.
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}


def read_nifti(path: Path, *, data: DataConfig) -> Scan:
    """One volume of a file, the numbers as stored, and its affine in mm.

    A file of several volumes (axes beyond the third, counted in file order) needs `data.volume`: one counted from 0, or
    "mean", which is accumulated in float64, volume by volume. The affine is that of the sform where its code is above
    0, else of the qform where its code is above 0, else NIfTI's method 1 (spacing alone, taken for radiological).
    Where both codes are above 0 and the two place a corner of the volume more than 0.1 mm apart, the details say so:
    orientation_disagreement_mm, and a note. Lengths in meters or microns are turned into mm.

    Raises SourceError where it is no scan of single real numbers, claims more than its file can hold or than
    `data.max_memory_gib` allows, is cut off, or has no such volume; nibabel, gzip and zlib raise errors of their own.
    """
    _check_extensions(path)
    with warnings.catch_warnings():
        # nibabel leaves the closing of an MGH file to the garbage collector, which closes it right here.
        warnings.simplefilter("ignore", ResourceWarning)
        image: Any = nib.load(path)
    if not isinstance(image, _IMAGES):
        raise SourceError(
            f"holds no scan but a {type(image).__name__}", where=path, hint="Give a 3-D NIfTI, MGH or Analyze volume."
        )
    shape, dtype = tuple(int(side) for side in image.shape), np.dtype(image.get_data_dtype())
    _check_kind(shape, dtype, path)
    _check_claims(image, shape, dtype, path)
    chosen = _chosen_volumes(shape, data, path)
    mean = len(chosen) > 1
    # A mean holds its sums beside the volume that is read.
    check_memory(shape[:3], voxel_bytes=dtype.itemsize + (8 if mean else 0), data=data, path=path)
    stored = _volumes(image, shape, chosen, path)
    if mean:
        voxels = np.zeros(shape[:3], np.float64, order="F")
        # Infinities of both signs, or sums beyond float64, end as voxels that are not finite and are counted.
        with np.errstate(over="ignore", invalid="ignore"):
            for one in stored:
                voxels += one
                del one  # before the next is read
        voxels /= len(chosen)
    else:
        (voxels,) = stored
    _check_header_end(image, path)
    unit = _MM_PER_UNIT.get(int(image.header["xyzt_units"]) & 7, 1.0) if isinstance(image, nib.Nifti1Pair) else 1.0
    affine = np.asarray(image.affine, np.float64).copy()
    affine[:3] *= unit
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    details: dict[str, object] = {
        "format": type(image).__name__,
        "shape": list(shape),
        "dtype": str(dtype),
        "slope": slope,
        "intercept": intercept,
        "orientation_from": _orientation_from(image),
    }
    if prod(shape[3:]) > 1:
        details |= {"volumes": prod(shape[3:]), "volume": data.volume}
    return Scan(voxels, slope, intercept, affine, details | _disagreement(image, shape, unit))


def read_header(path: Path) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Shape (X Y Z) and affine of a scan as its header has them; raises what `read_nifti` does, and more."""
    _check_extensions(path)
    image: Any = nib.load(path)
    x, y, z = (int(side) for side in image.shape[:3])
    return (x, y, z), np.asarray(image.affine, np.float64)


def _check_kind(shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
    """Refuse what is no volume of single real numbers."""
    if dtype.fields is not None:
        raise SourceError(
            f"its voxels are colors ({''.join(dtype.fields)}), not single real numbers",
            where=path,
            hint="Save one channel, or their mean, as a volume of its own; for pictures in color, train on images.",
        )
    if dtype.kind not in "iufb":
        raise SourceError(
            f"its voxels are {dtype}, not single real numbers",
            where=path,
            hint="Save the magnitude as a volume of its own, e.g. np.abs(np.asanyarray(img.dataobj)) with nibabel.",
        )
    sides = " x ".join(map(str, shape))
    if shape and min(shape) < 1:
        raise SourceError(f"has an empty axis: shape {sides}", where=path, hint="Write or download it again.")
    if len(shape) < 3:
        raise SourceError(
            f"has shape {sides}; a 3-D volume is needed",
            where=path,
            hint="Save a single slice with a third axis of length 1, or as an image for a model of images.",
        )


def _check_claims(image: Any, shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
    """Refuse a header that claims more than its file can hold."""
    file, offset = _image_file(image), int(image.dataobj.offset)
    held = file.stat().st_size
    claimed, room = prod(shape) * dtype.itemsize, (held * MAX_GZIP_RATIO if _is_packed(file) else held) - offset
    if offset < 0 or claimed > room:
        raise SourceError(
            f"its header claims {claimed} bytes of voxels from byte {offset} on, the file can hold at most "
            f"{max(room, 0)}",
            where=path,
            hint="The file is cut off or its header is wrong; copy it again.",
        )


def _chosen_volumes(shape: tuple[int, ...], data: DataConfig, path: Path) -> range:
    count, wanted = prod(shape[3:]), data.volume
    holds = f"holds {count} volumes (shape {' x '.join(map(str, shape))})"
    if wanted is None and count > 1:
        raise SourceError(
            f"{holds}; a single 3-D volume is needed",
            where=path,
            hint=f"Choose one with --volume N (0 to {count - 1}), or average them with --volume mean.",
        )
    if wanted == "mean":
        return range(count)
    index = 0 if wanted is None else wanted
    if index >= count:
        raise SourceError(
            f"{holds if count > 1 else 'holds one volume'}, there is no volume {index}",
            where=path,
            hint=f"They count from 0: give --volume {'0' if count == 1 else f'0 to {count - 1}'}, or --volume mean.",
        )
    return range(index, index + 1)


def _volumes(image: Any, shape: tuple[int, ...], chosen: range, path: Path) -> Iterator[NDArray[Any]]:
    """The numbers of these volumes (X Y Z) as stored, one after another; a gzip stream is read once, to its end."""
    file, dtype, offset = _image_file(image), np.dtype(image.dataobj.dtype), int(image.dataobj.offset)
    size = prod(shape[:3]) * dtype.itemsize
    if not _is_packed(file):
        for index in chosen:
            # Mapped, not read; get_unscaled, as scaled integers would become float64 as a whole.
            yield ArrayProxy(str(file), (shape[:3], dtype, offset + index * size, 1.0, 0.0)).get_unscaled()
        return
    with igzip.open(file) as stream:
        _skip(stream, offset + chosen.start * size, path)
        for _ in chosen:
            yield _filled(stream, size, path).view(dtype).reshape(shape[:3], order="F")
        _skip(stream, (prod(shape[3:]) - chosen.stop) * size, path)
        _read_to_end(stream, path)


def _filled(stream: ByteStream, size: int, path: Path) -> NDArray[np.uint8]:
    """The next `size` bytes, in pieces: gzip would hold them twice."""
    held = np.empty(size, np.uint8)
    view, start = held.data, 0
    while start < size:
        got = stream.readinto(view[start : start + _CHUNK_BYTES])
        if not got:
            raise _cut_off(size - start, path)
        start += got
    return held


def _skip(stream: ByteStream, size: int, path: Path) -> None:
    while size > 0:
        chunk = stream.read(min(size, _CHUNK_BYTES))
        if not chunk:
            raise _cut_off(size, path)
        size -= len(chunk)


def _read_to_end(stream: ByteStream, path: Path) -> None:
    """To the checksum, which the voxels alone do not reach: a flipped bit would pass as good."""
    left = MAX_EXTRA_BYTES
    while chunk := stream.read(_CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            raise SourceError(
                f"its gzip stream goes on for more than {MAX_EXTRA_BYTES >> 20} MiB after what its header names",
                where=path,
                hint="Its header is wrong, or it is no honest file; write it again.",
            )


def _cut_off(missing: int, path: Path) -> SourceError:
    return SourceError(
        f"is cut off: its gzip stream ends {missing} bytes before its voxels do", where=path, hint="Copy it again."
    )


def _check_header_end(image: Any, path: Path) -> None:
    """Read a packed .hdr to its checksum; that of the voxels was."""
    header = image.file_map.get("header")
    if header is not None and _is_packed(Path(header.filename)):
        with igzip.open(header.filename) as stream:
            _read_to_end(stream, path)


def _check_extensions(path: Path) -> None:
    """Refuse a NIfTI header whose extensions claim too much: nibabel reads them whole as it opens a file.

    Layout: sizeof_hdr (348 or 540), the header, 4 bytes of which the first says whether extensions follow, then each as
    int32 esize (with these 8 bytes), int32 ecode, content, up to vox_offset or the end of a .hdr (nifti1.h, "HEADER
    EXTENSIONS"; vox_offset is a float32 at byte 108 of NIfTI-1, an int64 at byte 168 of NIfTI-2).
    """
    stem = next((path.name[: -len(end)] for end in (".img", ".img.gz") if path.name.lower().endswith(end)), None)
    if stem is not None:
        # Suffixes keep their case: X.IMG has its X.HDR.
        path = path.with_name(stem + path.name[len(stem) :].replace("img", "hdr").replace("IMG", "HDR"))
    if not path.is_file():  # nibabel says what is missing
        return
    _check_packing(path)
    alone = not path.name.lower().endswith((".hdr", ".hdr.gz"))
    with igzip.open(path) if _is_packed(path) else path.open("rb") as stream:
        head = stream.read(4)
        order = next((mark for mark in "<>" if head in (struct.pack(f"{mark}i", size) for size in (348, 540))), None)
        if order is None:
            return
        size = struct.unpack(f"{order}i", head)[0]
        head += stream.read(size)
        if len(head) < size + 4 or not head[size]:
            return
        offset = (
            struct.unpack_from(f"{order}f", head, 108) if size == 348 else struct.unpack_from(f"{order}q", head, 168)
        )
        position, end = size + 4, offset[0] if alone else float("inf")
        while position + 16 <= end and len(ahead := stream.read(8)) == 8:
            length = struct.unpack(f"{order}i", ahead[:4])[0]
            position += length
            if position > MAX_EXTRA_BYTES:
                raise SourceError(
                    f"its header extensions claim {position - size - 4} bytes",
                    where=path,
                    hint="Its header is wrong; write it again without extensions.",
                )
            if length < 16:  # damaged, which nibabel says
                return
            stream.seek(length - 8, 1)


def _image_file(image: Any) -> Path:
    return Path(image.file_map["image"].filename)


def _check_packing(path: Path) -> None:
    """Refuse a file whose name says other than its first bytes whether it is a gzip stream."""
    with path.open("rb") as stream:
        head = stream.read(4)
    if _is_packed(path) and head in _PLAIN:
        what, other = "is named as a gzip stream, and is none", path.name.removesuffix(".gz")
    elif not _is_packed(path) and head[:2] == _GZIP:
        what, other = "is a gzip stream, and is not named so", f"{path.name}.gz"
    else:
        return
    raise SourceError(what, where=path, hint=f"Rename it: {other}")


def _is_packed(file: Path) -> bool:
    return file.suffix.lower() in (".gz", ".mgz")


def _orientation_from(image: Any) -> str:
    if isinstance(image, nib.MGHImage):
        return "header" if int(image.header["goodRASFlag"]) == 1 else "none: assumed"
    if not isinstance(image, nib.Nifti1Pair):
        return "none (Analyze): assumed"
    if int(image.header["sform_code"]) > 0:
        return "sform"
    return "qform" if int(image.header["qform_code"]) > 0 else "none: assumed"


def _disagreement(image: Any, shape: tuple[int, ...], unit: float) -> dict[str, object]:
    """What to say where sform and qform both count and place a corner of the volume differently; else nothing."""
    if not isinstance(image, nib.Nifti1Pair) or min(int(image.header[f"{form}form_code"]) for form in "sq") <= 0:
        return {}
    sform = image.header.get_sform()
    try:
        qform = image.header.get_qform()
    except (HeaderDataError, ValueError) as error:
        return {"notes": [f"the sform is used; the qform cannot be read ({error})"]}
    corners = np.array([[*corner, 1] for corner in product(*((0, side - 1) for side in shape[:3]))])
    with np.errstate(over="ignore", invalid="ignore"):  # of forms that are no numbers
        apart = float(np.linalg.norm(corners @ (sform - qform).T, axis=1).max()) * unit
    if apart <= MAX_DISAGREEMENT_MM:
        return {}
    codes = ["".join(str(code) for code in nib.aff2axcodes(form)) for form in (sform, qform)]
    turned = f", and other directions ({codes[0]} and {codes[1]})" if codes[0] != codes[1] else ""
    note = f"the sform is used; the qform places corners of the volume up to {apart:.3g} mm elsewhere{turned}"
    return {"orientation_disagreement_mm": round(apart, 3), "notes": [note]}
