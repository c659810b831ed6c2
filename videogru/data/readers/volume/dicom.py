"""Scans from DICOM: a folder with the slices of a series, or one file of one or many frames.

Needs pydicom (the extra `dicom`). Headers are read first; pixels only once it is known what they must be.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.readers.dicom_files import has_magic, head_of, is_dicom_name, may_be_dicom_name
from videogru.data.readers.volume.dicom_geometry import Slice, stack_of
from videogru.data.readers.volume.memory import check_memory
from videogru.data.readers.volume.scan import Scan
from videogru.errors import SourceError

INSTALL = "pip install 'videogru[dicom]'"
# DEFLATE cannot shrink data by more than this (zlib's technical notes, "Maximum Compression Factor").
_DEFLATE_RATIO = 1032
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LARGEST_HEADER = 256 * 2**20


def read_dicom(path: Path, *, data: DataConfig) -> Scan:
    """The scan of a folder with DICOM files, or of one such file; `data.series` chooses where a folder holds several.

    Slices are ordered by their positions, see `stack_of`. Where RescaleSlope or RescaleIntercept differ between slices,
    voxels are rescaled floats. Objects without pixels (reports, DICOMDIR) and files of other formats are counted in
    `details`. Raises SourceError without pydicom, where nothing or several series are there, where a tag that is needed
    is missing, where pixels are in color, cut off, or compressed in a way that no installed decoder reads, and where
    they claim more than their file can hold or than `data.max_memory_gib`.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise SourceError("is DICOM, which needs pydicom", where=path, hint=INSTALL) from error
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scan = _read(path, data)
    except SourceError:
        raise
    # Damaged files raise nearly anything from inside pydicom and its decoders.
    except Exception as error:
        raise SourceError(
            f"cannot be read as DICOM ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            where=path,
            hint="Check the files, e.g. with dcmdump or `python -m pydicom show FILE`.",
        ) from error
    said = dict.fromkeys(" ".join(str(one.message).split())[:200] for one in caught)
    if said:
        scan.details["warnings"] = list(said)[:5]
    return scan


def _read(path: Path, data: DataConfig) -> Scan:
    if data.volume not in (None, 0, "mean"):
        raise SourceError(
            f"is DICOM, where a series is one volume: there is no volume {data.volume}",
            where=path,
            hint="Leave --volume (data.volume) out; --series NUMBER chooses among several series.",
        )
    headers, skipped = _headers(path)
    series, chosen = _chosen_series(path, headers, data.series)
    slices = [one for file, header in chosen for one in _slices(file, header)]
    stack = stack_of(slices, where=path)
    voxels, slope, intercept = _voxels(stack.slices, dict(chosen), path, data)
    first = chosen[0][1]
    details: dict[str, object] = {
        "format": "DICOM",
        "shape": list(voxels.shape),
        "dtype": str(voxels.dtype),
        "orientation_from": "ImageOrientationPatient",
        "modality": _text(first, "Modality"),
        "series": series,
        "series_number": _text(first, "SeriesNumber"),
        "series_description": _text(first, "SeriesDescription"),
        "photometric": _text(first, "PhotometricInterpretation"),
        "files": len(chosen),
        **stack.details,
        **skipped,
    }
    if len(stack.slices) == 1:
        details["note"] = (
            "one slice only; to read its whole series, name its folder" if path.is_file() else "one slice only"
        )
    return Scan(voxels, slope, intercept, stack.affine, details)


# Headers --------------------------------------------------------------------------------------------------------


def _headers(path: Path) -> tuple[list[tuple[Path, Any]], dict[str, object]]:
    """(file, header) of each image, by file name; and what else was found, counted."""
    if path.is_file():
        files, others = [path], 0
    else:
        files, others = [], 0
        for file in sorted(path.iterdir()):
            if file.name.startswith(".") or not file.is_file():
                continue
            nameless = may_be_dicom_name(file.name) and has_magic(head_of(file))
            if is_dicom_name(file.name) or nameless:
                files.append(file)
            else:
                others += 1
    headers: list[tuple[Path, Any]] = []
    pictureless: Counter[str] = Counter()
    for file in files:
        header = _header(file)
        kind = _class_name(header)
        if not any(word in header for word in ("Rows", "Columns", "BitsAllocated")) and "Image Storage" not in kind:
            pictureless[kind] += 1
        else:
            headers.append((file, header))
    if not headers:
        found = ", ".join(f"{count} {kind}" for kind, count in pictureless.most_common()) or "no DICOM file"
        raise SourceError(f"holds no image but {found}", where=path, hint="Name the folder of an image series.")
    skipped: dict[str, object] = {}
    if pictureless:
        skipped["objects_without_image"] = dict(pictureless)
    if others:
        skipped["other_files"] = others
    return headers, skipped


def _header(file: Path) -> Any:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    if file.stat().st_size == 0:
        raise SourceError("is empty (0 bytes)", where=file, hint="Copy or download it again.")
    try:
        return dcmread(file, stop_before_pixels=True, defer_size=_LARGEST_HEADER)
    except InvalidDicomError as error:
        raise SourceError(
            "is no DICOM file: the mark DICM is missing at byte 128",
            where=file,
            hint="Take it out of the folder; a DICOM file without that header can be given one with: dcmconv +F IN OUT",
        ) from error
    except Exception as error:
        raise SourceError(
            f"has a damaged DICOM header ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            where=file,
            hint="Copy it again, or take it out of the folder.",
        ) from error


def _class_name(header: Any) -> str:
    from pydicom.uid import UID

    uid = header.get("SOPClassUID") or getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID")
    return UID(str(uid)).name if uid else "object without SOPClassUID"


def _chosen_series(
    path: Path, headers: list[tuple[Path, Any]], wanted: str | None
) -> tuple[str, list[tuple[Path, Any]]]:
    """The SeriesInstanceUID and the files of the one series that is there, or is wanted."""
    by_series: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for file, header in headers:
        uid = _text(header, "SeriesInstanceUID")
        if not uid:
            raise _missing("SeriesInstanceUID", file)
        by_series[uid].append((file, header))
    numbers = {uid: _text(found[0][1], "SeriesNumber") for uid, found in by_series.items()}
    if wanted is None:
        fitting = list(by_series)
    else:
        fitting = [wanted] if wanted in by_series else [uid for uid in by_series if numbers[uid] == wanted]
    if len(fitting) == 1:
        return fitting[0], by_series[fitting[0]]
    listed = "; ".join(
        f"{numbers[uid] or '-'}: {_text(found[0][1], 'SeriesDescription') or 'no description'}, "
        f"{len(found)} files ({uid})"
        for uid, found in sorted(by_series.items(), key=lambda item: (numbers[item[0]].zfill(12), item[0]))
    )
    if wanted is None:
        what = f"holds {len(by_series)} series: {listed}"
    elif fitting:
        what = f"holds {len(fitting)} series of number {wanted}: {listed}"
    else:
        what = f"holds no series {wanted}, but: {listed}"
    raise SourceError(
        what, where=path, hint="Choose one by its number or UID: --series NUMBER (or --set data.series=NUMBER)."
    )


def _slices(file: Path, header: Any) -> Iterator[Slice]:
    """The slices of one file, whose header is checked for all that its pixels need."""
    rows, columns = _whole(header, "Rows", file), _whole(header, "Columns", file)
    samples = _whole(header, "SamplesPerPixel", file, default=1)
    photometric = _text(header, "PhotometricInterpretation")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise SourceError(
            f"its pixels are {photometric or 'of no stated kind'} with {samples} samples, not gray values",
            where=file,
            hint="Only MONOCHROME1 and MONOCHROME2 are read: leave color pictures out.",
        )
    if header.get("ModalityLUTSequence"):
        raise SourceError(
            "maps its values by a table (ModalityLUTSequence)", where=file, hint="Convert it to values first."
        )
    frames = _whole(header, "NumberOfFrames", file, default=1)
    groups = header.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        if frames > 1:
            raise SourceError(
                f"has {frames} frames but no PerFrameFunctionalGroupsSequence, so nothing says where they lie",
                where=file,
                hint="Export it as enhanced multi-frame or as single slices, or convert it to NIfTI.",
            )
        yield _slice(file, 0, rows, columns, [header])
        return
    if len(groups) != frames:
        raise SourceError(f"has {frames} frames but places for {len(groups)}", where=file, hint="Export it again.")
    shared = header.get("SharedFunctionalGroupsSequence") or [None]
    for frame, group in enumerate(groups):
        # What holds for one frame goes before what holds for all.
        places = [_macros(group), _macros(shared[0]), [header]]
        yield _slice(file, frame, rows, columns, [place for some in places for place in some])


_MACROS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
    "PixelValueTransformationSequence",
)


def _macros(group: Any) -> list[Any]:
    """The functional groups that say where a frame lies and what its values mean."""
    found = (group.get(name) for name in _MACROS) if group is not None else ()
    return [sequence[0] for sequence in found if sequence]


def _slice(file: Path, frame: int, rows: int, columns: int, places: Sequence[Any]) -> Slice:
    spacing = _numbers(places, "PixelSpacing", 2, file)
    if spacing.min() <= 0:
        raise SourceError(f"PixelSpacing is {spacing.tolist()}, not above 0", where=file, hint="Correct the tag.")
    slope = float(_numbers(places, "RescaleSlope", 1, file, default=1.0)[0])
    if slope == 0:
        raise SourceError("RescaleSlope is 0, which makes all values the same", where=file, hint="Correct the tag.")
    thickness = None
    for tag in ("SpacingBetweenSlices", "SliceThickness"):
        value = float(_numbers(places, tag, 1, file, default=0.0)[0])
        if value > 0 and thickness is None:
            thickness = (value, tag)
    return Slice(
        file=file,
        frame=frame,
        rows=rows,
        columns=columns,
        position=_numbers(places, "ImagePositionPatient", 3, file),
        orientation=_numbers(places, "ImageOrientationPatient", 6, file),
        spacing=spacing,
        slope=slope,
        intercept=float(_numbers(places, "RescaleIntercept", 1, file, default=0.0)[0]),
        thickness=thickness,
    )


def _numbers(
    places: Sequence[Any], tag: str, count: int, file: Path, *, default: float | None = None
) -> NDArray[np.float64]:
    """(count,) finite numbers of a tag, from the first place that has it; an empty one counts as absent."""
    value = next((found for place in places if (found := place.get(tag)) not in (None, "")), None)
    if value is None:
        if default is None:
            raise _missing(tag, file)
        return np.full(count, default)
    try:
        numbers = np.atleast_1d(np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise SourceError(f"{tag} is {str(value)[:80]}, not {count} numbers", where=file, hint="Correct the tag.")
    return numbers


def _whole(header: Any, tag: str, file: Path, *, default: int | None = None) -> int:
    number = float(_numbers([header], tag, 1, file, default=None if default is None else float(default))[0])
    if number < 1 or number != int(number):
        raise SourceError(f"{tag} is {number:g}, not a whole number from 1 on", where=file, hint="Copy it again.")
    return int(number)


def _text(header: Any, tag: str) -> str:
    value = header.get(tag)
    return "" if value is None else str(value).strip()


def _missing(tag: str, file: Path) -> SourceError:
    return SourceError(
        f"misses {tag}",
        where=file,
        hint="Leave it out of the folder, or convert the series with a tool that knows its scanner.",
    )


# Pixels ---------------------------------------------------------------------------------------------------------


def _voxels(
    slices: list[Slice], headers: dict[Path, Any], path: Path, data: DataConfig
) -> tuple[NDArray[Any], float, float]:
    """(X Y Z) of ordered slices, with the slope and intercept that all share; rescaled floats where they do not."""
    first = slices[0]
    one_scale = all((one.slope, one.intercept) == (first.slope, first.intercept) for one in slices)
    bits = [_whole(header, "BitsAllocated", file) for file, header in headers.items()]
    for (file, header), wide in zip(headers.items(), bits, strict=True):
        _refuse_claims(file, header, wide)
    widest = max(bits)
    itemsize = widest // 8 if one_scale else (8 if widest > 16 else 4)
    check_memory((first.columns, first.rows, len(slices)), voxel_bytes=itemsize, data=data, path=path)
    places: dict[Path, list[int]] = defaultdict(list)
    for place, one in enumerate(slices):
        places[one.file].append(place)
    voxels: NDArray[Any] | None = None
    for file, wanted in places.items():
        pixels = _pixels(file, slices[wanted[0]])
        kind = pixels.dtype.type if one_scale else (np.float64 if widest > 16 else np.float32)
        if voxels is None:
            voxels = np.empty((first.columns, first.rows, len(slices)), kind, order="F")
        elif one_scale and kind != voxels.dtype.type:
            # Signed and unsigned slices of one series: a type that holds both.
            voxels = voxels.astype(np.result_type(voxels.dtype, kind), order="F", copy=False)
        for place in wanted:
            one = slices[place]
            values = pixels[one.frame].T
            voxels[:, :, place] = values if one_scale else values.astype(np.float64) * one.slope + one.intercept
    assert voxels is not None  # a stack has slices
    return (voxels, first.slope, first.intercept) if one_scale else (voxels, 1.0, 0.0)


def _refuse_claims(file: Path, header: Any, bits: int) -> None:
    """Raise where a header claims more pixels than its file can hold, or pixels that nobody here reads."""
    from pydicom.pixels import get_decoder

    if bits not in (8, 16, 32, 64):
        raise SourceError(
            f"has pixels of {bits} bits; 8, 16, 32 and 64 are read", where=file, hint="Leave it out of the folder."
        )
    syntax = header.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise SourceError("misses TransferSyntaxUID", where=file, hint="Write it anew with a DICOM tool.")
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise SourceError(f"has an unknown transfer syntax {syntax}", where=file, hint=_DECOMPRESS)
    if syntax.is_encapsulated:
        try:
            decoder = get_decoder(syntax)
            available, lacking = decoder.is_available, decoder.missing_dependencies
        except NotImplementedError:
            available, lacking = False, []
        if not available:
            raise SourceError(
                f"is compressed by {syntax.name}, for which no decoder is installed"
                + (f" (one of: {'; '.join(lacking)})" if lacking else ""),
                where=file,
                hint=_DECOMPRESS,
            )
        return
    sides = [_whole(header, tag, file, default=1) for tag in ("NumberOfFrames", "Rows", "Columns")]
    claimed = prod(sides) * bits // 8
    held = file.stat().st_size * (_DEFLATE_RATIO if syntax == _DEFLATED else 1)
    if claimed > held:
        raise SourceError(
            f"its header claims {claimed} bytes of pixels, the file can hold at most {held}",
            where=file,
            hint="The file is cut off or its header is wrong; copy it again.",
        )


_DECOMPRESS = (
    "Install a decoder (pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg), or decompress first, e.g. with: "
    "gdcmconv --raw IN OUT"
)


def _pixels(file: Path, one: Slice) -> NDArray[Any]:
    """(frames rows columns) as stored. Raises SourceError where they are missing or cannot be decoded."""
    from pydicom import dcmread

    try:
        pixels = np.asarray(dcmread(file).pixel_array)
    except Exception as error:
        raise SourceError(
            f"its pixels cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            where=file,
            hint="The file is cut off or damaged; copy it again.",
        ) from error
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[1:] != (one.rows, one.columns):
        raise SourceError(
            f"its pixels have shape {pixels.shape}, its header says {one.rows} rows of {one.columns}",
            where=file,
            hint="Copy it again.",
        )
    return pixels
