"""Volumes by NIfTI (and MGH, Analyze), as slices along an axis of the patient.

The array is turned to the nearest RAS orientation (x to the patient's right, y to anterior, z to superior) and then
unrolled. Integers stay integers until slices are chosen; only those become float32.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from jaxtyping import Float32, Shaped
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from videogru.config import DataConfig, Kind
from videogru.data.scan import Scan
from videogru.errors import SourceError
from videogru.sequence import Unit

Axis = Literal["axial", "coronal", "sagittal"]

MAX_BYTES = 4 * 2**30
# DEFLATE cannot shrink data by more than this (zlib's technical notes, "Maximum Compression Factor").
MAX_GZIP_RATIO = 1032
MAX_PERCENTILE_VOXELS = 2_000_000
# axis -> RAS axes that become (T, H, W)
_ORDER: dict[str, tuple[int, int, int]] = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
_IMAGES = (nib.Nifti1Pair, nib.Nifti2Pair, nib.MGHImage, nib.AnalyzeImage)


def unroll(volume: Shaped[np.ndarray, "X Y Z"], axis: Axis) -> Shaped[np.ndarray, "T H W"]:
    """An RAS array (X Y Z) as slices (T H W), a view.

    axial     T from inferior to superior   rows from anterior to posterior    columns from patient right to left
    coronal   T from posterior to anterior  rows from superior to inferior     columns from patient right to left
    sagittal  T from patient left to right  rows from superior to inferior     columns from anterior to posterior
    """
    return volume.transpose(_ORDER[axis])[:, ::-1, ::-1]


def to_unit_range(volume: Shaped[np.ndarray, "..."], data: DataConfig) -> Float32[np.ndarray, "..."]:
    """A volume of integers or floats as float32 in 0..1, linear between the ends of its intensity window, clipped.

    intensity=window: the ends are window_low and window_high. intensity=percentile: they are percentiles of the finite
    voxels; of a volume with more than two million, only every s-th voxel along each axis counts. Where the two
    percentiles coincide (masks), the ends are minimum and maximum of all finite voxels. A constant volume gives zeros.
    NaN and infinities give 0. Raises ValueError without a finite voxel.
    """
    return _rescale(volume, *_intensity_ends(volume, data, slope=1.0, intercept=0.0))


def open_volume(path: Path, *, data: DataConfig) -> "Volume":
    """Read a volume for `data.axis` and `data.intensity`.

    Raises SourceError where it is no single 3-D volume of real numbers, is damaged, claims more than its file can hold
    or more than 4 GiB, has no usable affine, or no finite voxel.
    """
    try:
        return _load(path, data)
    except SourceError:
        raise
    # nibabel, gzip and zlib each raise their own kinds on damaged files.
    except Exception as error:
        raise SourceError(
            f"cannot be read as a volume ({type(error).__name__}: {error})",
            where=path,
            hint="Check the file with `nib-ls`; a .hdr needs its .img beside it.",
        ) from error


@dataclass(eq=False, slots=True)
class Volume:
    """A `FrameSource` over an unrolled volume; slices are float32 (T 1 H W) in 0..1, see `to_unit_range`.

    positions: centers of the slices in mm, the first at 0; extent: half a slice more at both ends.
    """

    path: Path
    positions: NDArray[np.float64]
    extent: tuple[float, float]
    pixel_aspect: float
    details: dict[str, object]
    slope: float
    intercept: float
    ends: tuple[float, float]
    slices: NDArray[Any] | None = field(repr=False)
    kind: Kind = "volume"
    unit: Unit = "mm"

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The slices at increasing `indices` as float32 (T 1 H W) in 0..1."""
        chosen = [int(index) for index in indices]
        if self.slices is None:
            raise ValueError(f"{self.path} is closed")
        if not chosen or any(a >= b for a, b in pairwise(chosen)):
            raise ValueError(f"indices must increase strictly, and be at least one: {chosen}")
        if chosen[0] < 0 or chosen[-1] >= len(self.slices):
            raise ValueError(f"indices {chosen[0]}..{chosen[-1]} are outside 0..{len(self.slices) - 1}")
        values = self.slices[chosen].astype(np.float64) * self.slope + self.intercept
        return torch.from_numpy(_rescale(values, *self.ends)).unsqueeze(1)

    def close(self) -> None:
        """Let go of the voxels; may be called twice."""
        self.slices = None

    def __enter__(self) -> "Volume":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def volume_of(scan: Scan, *, path: Path, data: DataConfig) -> Volume:
    """A scan turned to the nearest RAS orientation and unrolled along `data.axis`.

    Raises SourceError where its affine is singular or no voxel is finite.
    """
    if not np.isfinite(scan.affine).all() or abs(np.linalg.det(scan.affine[:3, :3])) < 1e-12:
        raise SourceError(
            "its affine is singular, so directions and spacing are unknown",
            where=path,
            hint="Correct sform or qform in the header.",
        )
    orientation = nib.io_orientation(scan.affine)
    volume = nib.apply_orientation(scan.voxels, orientation)
    spacing = [0.0, 0.0, 0.0]
    for size, target in zip(voxel_sizes(scan.affine), orientation[:, 0], strict=True):
        spacing[int(target)] = float(size)
    bad = 0 if volume.dtype.kind in "iub" else volume.size - int(np.count_nonzero(np.isfinite(volume)))
    if bad == volume.size:
        raise SourceError("not one voxel is a finite number", where=path, hint="Leave this file out.")
    along, down, across = _ORDER[data.axis]
    step = spacing[along]
    positions = np.arange(volume.shape[along], dtype=np.float64) * step
    return Volume(
        path=path,
        positions=positions,
        extent=(-step / 2, float(positions[-1]) + step / 2),
        pixel_aspect=spacing[down] / spacing[across],
        details=scan.details
        | {
            "slope": scan.slope,
            "intercept": scan.intercept,
            "orientation": "".join(nib.aff2axcodes(scan.affine)),
            "spacing_mm_ras": spacing,
            "axis": data.axis,
            "not_finite": bad,
        },
        slope=scan.slope,
        intercept=scan.intercept,
        ends=_intensity_ends(volume, data, slope=scan.slope, intercept=scan.intercept),
        slices=unroll(volume, data.axis),
    )


def _load(path: Path, data: DataConfig) -> Volume:
    image: Any = nib.load(path)
    if not isinstance(image, _IMAGES):
        raise SourceError(
            f"holds no scan but a {type(image).__name__}", where=path, hint="Give a 3-D NIfTI, MGH or Analyze volume."
        )
    _check_claims(image, path)
    # The raw numbers: nibabel would turn scaled integers into float64 as a whole.
    raw = np.asarray(image.dataobj.get_unscaled()).reshape(image.shape[:3])
    _check_end(image)
    details: dict[str, object] = {
        "format": type(image).__name__,
        "shape": [int(side) for side in image.shape],
        "dtype": str(image.get_data_dtype()),
        "orientation_from": _orientation_from(image),
    }
    scan = Scan(
        raw, float(image.dataobj.slope), float(image.dataobj.inter), np.asarray(image.affine, np.float64), details
    )
    return volume_of(scan, path=path, data=data)


def _check_end(image: Any) -> None:
    """Read a gzip stream to its checksum, which the voxels alone do not reach: a flipped bit would pass as good."""
    for holder in image.file_map.values():
        name = str(holder.filename or "")
        if name.lower().endswith((".gz", ".mgz")):
            left = MAX_BYTES
            with gzip.open(name) as stream:
                while left > 0 and (chunk := stream.read(1 << 20)):
                    left -= len(chunk)


def _check_claims(image: Any, path: Path) -> None:
    shape, dtype = tuple(int(side) for side in image.shape), np.dtype(image.get_data_dtype())
    if dtype.kind not in "iufb" or dtype.fields is not None:
        raise SourceError(
            f"its voxels are {dtype}, not single real numbers",
            where=path,
            hint="Save the magnitude, or one channel, as a volume of its own.",
        )
    if len(shape) < 3 or any(side > 1 for side in shape[3:]):
        raise SourceError(
            f"has shape {' x '.join(map(str, shape))}; a single 3-D volume is needed",
            where=path,
            hint="Cut one 3-D volume out first, e.g. nibabel: nib.save(img.slicer[..., 0], 'one.nii.gz').",
        )
    if min(shape) < 1:
        raise SourceError(f"has an empty axis: shape {' x '.join(map(str, shape))}", where=path)
    claimed = prod(shape) * dtype.itemsize
    holder = Path(image.file_map["image"].filename)
    held = holder.stat().st_size
    packed = holder.suffix.lower() in (".gz", ".mgz")
    room = held * MAX_GZIP_RATIO if packed else held - int(image.dataobj.offset)
    if claimed > room:
        raise SourceError(
            f"its header claims {claimed} bytes of voxels, the file can hold at most {max(room, 0)}",
            where=path,
            hint="The file is cut off or its header is wrong; copy it again.",
        )
    if claimed > MAX_BYTES:
        raise SourceError(
            f"has {claimed / 2**30:.1f} GiB of voxels, the limit is {MAX_BYTES >> 30}",
            where=path,
            hint="Crop or resample it first.",
        )


def _orientation_from(image: Any) -> str:
    if isinstance(image, nib.MGHImage):
        return "header"
    if not isinstance(image, nib.Nifti1Pair):
        return "none (Analyze): assumed"
    if int(image.header["sform_code"]) > 0:
        return "sform"
    return "qform" if int(image.header["qform_code"]) > 0 else "none: assumed"


def _intensity_ends(volume: NDArray[Any], data: DataConfig, *, slope: float, intercept: float) -> tuple[float, float]:
    """Values (after slope and intercept) that become 0 and 1; equal where the volume is constant."""
    by_window = data.intensity == "window"
    low, high = (data.window_low, data.window_high) if by_window else (data.percentile_low, data.percentile_high)
    if by_window:
        return low, high
    stride = ceil((volume.size / MAX_PERCENTILE_VOXELS) ** (1 / max(volume.ndim, 1)))
    finite = _finite(volume[(slice(None, None, stride),) * volume.ndim])
    if len(finite) == 0:
        finite = _finite(volume)
    if len(finite) == 0:
        raise ValueError("not one voxel is a finite number")
    first, last = np.percentile(finite * slope + intercept, [low, high])
    if first == last:
        # On the stored numbers: a float64 copy of a large mask would take eight times its memory.
        floating = volume.dtype.kind == "f"
        ends = [
            np.min(volume, initial=np.inf, where=np.isfinite(volume)) if floating else volume.min(),
            np.max(volume, initial=-np.inf, where=np.isfinite(volume)) if floating else volume.max(),
        ]
        first, last = sorted(float(end) * slope + intercept for end in ends)
    if not np.isfinite(last - first):
        raise ValueError(f"intensities from {first:g} to {last:g} span more than a number can hold")
    return float(first), float(last)


def _finite(volume: NDArray[Any]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = volume.astype(np.float64).ravel()
    return values if volume.dtype.kind in "iub" else values[np.isfinite(values)]


def _rescale(values: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    if low == high:
        return np.zeros(values.shape, np.float32)
    # float32 holds 16-bit integers exactly; wider numbers are shifted before they are rounded.
    unit: Any = values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)
    unit -= low
    unit /= high - low
    if values.dtype.kind == "f":
        unit[~np.isfinite(values)] = 0
    clipped: NDArray[np.float32] = np.clip(unit, 0, 1).astype(np.float32)
    return clipped
