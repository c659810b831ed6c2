"""Scans as slices along an axis of the patient, in 0..1; a reader for each format gives the scan (`volume_nifti`).

The array is turned to the nearest RAS orientation (x to the patient's right, y to anterior, z to superior) and then
unrolled. Integers stay integers until slices are chosen; only those become float32.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import nibabel as nib
import numpy as np
import torch
from jaxtyping import Float32, Shaped
from nibabel.affines import obliquity, voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.readers.volume.nifti import read_header, read_nifti
from videogru.data.readers.volume.percentiles import finite_percentiles
from videogru.data.readers.volume.scan import Scan
from videogru.errors import SourceError
from videogru.kinds import Kind, Unit

Axis = Literal["axial", "coronal", "sagittal"]

MAX_PERCENTILE_VOXELS = 2_000_000
# What a damaged header can raise; it comes back, told well, when the scan is read.
_HEADER_ERRORS = (
    *(OSError, EOFError, ValueError, TypeError, ArithmeticError, MemoryError, LookupError, SourceError),
    *(ImageFileError, HeaderDataError, struct.error, zlib.error, np.linalg.LinAlgError),
)
# axis -> RAS axes that become (T, H, W)
_ORDER: dict[Axis, tuple[int, int, int]] = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}


def unroll(volume: Shaped[np.ndarray, "X Y Z"], axis: Axis) -> Shaped[np.ndarray, "T H W"]:
    """An RAS array (X Y Z) as slices (T H W), a view.

    axial     T from inferior to superior   rows from anterior to posterior    columns from patient right to left
    coronal   T from posterior to anterior  rows from superior to inferior     columns from patient right to left
    sagittal  T from patient left to right  rows from superior to inferior     columns from anterior to posterior
    """
    return volume.transpose(_ORDER[axis])[:, ::-1, ::-1]


def patient_axes(axis: Axis) -> str:
    """The patient axes (x, y, z) that T, H and W run along, such as zyx for axial."""
    return "".join("xyz"[place] for place in _ORDER[axis])


def chosen_axis(asked: str, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> Axis:
    """`data.axis` as an axis. auto: the one with the thickest `spacing` (mm along R, A, S), slices being cut across it.

    Spacings within a thousandth of the thickest count as equal; then axial goes first, coronal second.
    """
    if asked != "auto":
        return cast(Axis, asked)
    thick = max(spacing) * (1 - 1e-3)
    return next(axis for axis in _ORDER if spacing[_ORDER[axis][0]] >= thick)


def to_unit_range(volume: Shaped[np.ndarray, "..."], data: DataConfig) -> Float32[np.ndarray, "..."]:
    """A volume of integers or floats as float32 in 0..1, linear between the ends of its intensity window, clipped.

    intensity=window: the ends are window_low and window_high. intensity=percentile: they are percentiles of the finite
    voxels; of a volume with more than two million, only every s-th voxel along each axis counts. intensity=zscore: they
    are mean - zscore_range * sd and mean + zscore_range * sd of the foreground, which are the voxels above the mean of
    all finite ones, as in TorchIO's ZNormalization(masking_method=ZNormalization.mean); sd with n - 1. Where the two
    ends coincide (masks), minimum and maximum of all finite voxels take their place. A constant volume gives zeros,
    but for intensity=window, whose ends are fixed. NaN and infinities give 0. Raises ValueError without a finite voxel.
    """
    return _rescale(volume, *_intensity_ends(volume, data, slope=1.0, intercept=0.0))


def open_volume(path: Path, *, data: DataConfig) -> "Volume":
    """Read a volume for `data.volume`, `data.axis` and `data.intensity`; see `read_nifti` and `volume_of`.

    Raises SourceError where it is no volume of real numbers, holds several and none is chosen, is damaged, claims more
    than its file can hold or than `data.max_memory_gib`, has no usable affine, or no finite voxel.
    """
    try:
        return volume_of(read_nifti(path, data=data), path=path, data=data)
    except SourceError:
        raise
    # nibabel, gzip and zlib each raise their own kinds on damaged files.
    except Exception as error:
        raise SourceError(
            f"cannot be read as a volume ({type(error).__name__}: {error})",
            where=path,
            hint="Check the file with `nib-ls`; a .hdr needs its .img beside it.",
        ) from error


def depth_of(path: Path, *, data: DataConfig) -> int:
    """How many slices a scan has along `data.axis`, from its header alone; of a DICOM folder, its files.

    0 where the header does not tell. Nothing is checked: who reads the scan does that.
    """
    try:
        if path.is_dir():
            return sum(1 for entry in path.iterdir() if entry.is_file())
        shape, affine = read_header(path)
        orientation, sizes = _orientation(affine, path), voxel_sizes(affine)
        sides, spacing = [0, 0, 0], [0.0, 0.0, 0.0]
        for side, size, target in zip(shape, sizes, orientation[:, 0], strict=True):
            sides[int(target)], spacing[int(target)] = side, float(size)
        return sides[_ORDER[chosen_axis(data.axis, spacing)][0]]
    except _HEADER_ERRORS:
        return 0


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
        unit = np.empty((len(chosen), 1, *self.slices.shape[1:]), np.float32)
        # One by one: float64 copies of all of them would take several times the memory of the clip.
        # Voxels that are no numbers, or become infinite, are counted and give 0.
        with np.errstate(over="ignore", invalid="ignore"):
            for place, index in enumerate(chosen):
                values = self.slices[index].astype(np.float64) * self.slope + self.intercept
                unit[place, 0] = _rescale(values, *self.ends)
        return torch.from_numpy(unit)

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
    """A scan as slices along `data.axis`, in the orientation that is nearest to RAS, with `data.intensity`.

    Oblique scans are turned by quarter turns and mirrors only, never resampled. Spacing is the length of the affine's
    columns. Adds to the scan's details: orientation (of the stored axes), spacing_mm_ras, axis (that was chosen),
    not_finite (voxels that are NaN or infinite), and notes where its grid is skew or one slice is cut along another
    axis. Raises SourceError where the affine is singular, or intensities cannot be mapped.
    """
    if scan.voxels.ndim != 3 or not scan.voxels.size:
        raise ValueError(f"a scan has three axes, none empty, not {scan.voxels.shape}")
    orientation, sizes = _orientation(scan.affine, path), voxel_sizes(scan.affine)
    # A view: nothing is copied.
    volume = nib.apply_orientation(scan.voxels, orientation)
    spacing = [0.0, 0.0, 0.0]
    for size, target in zip(sizes, orientation[:, 0], strict=True):
        spacing[int(target)] = float(size)
    bad = 0
    if volume.dtype.kind not in "iub":
        bad = sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in _blocks(volume))
    if bad == volume.size:
        raise SourceError("not one voxel is a finite number", where=path, hint="Leave this file out.")
    try:
        ends = _intensity_ends(volume, data, slope=scan.slope, intercept=scan.intercept)
    except ValueError as error:
        raise SourceError(str(error), where=path, hint="Leave this file out, or use data.intensity=window.") from error
    axis = chosen_axis(data.axis, spacing)
    along, down, across = _ORDER[axis]
    step = spacing[along]
    notes = [*cast(list[str], scan.details.get("notes") or ()), *_shape_notes(volume.shape, scan.affine, along)]
    positions = np.arange(volume.shape[along], dtype=np.float64) * step
    return Volume(
        path=path,
        positions=positions,
        extent=(-step / 2, float(positions[-1]) + step / 2),
        pixel_aspect=spacing[down] / spacing[across],
        details=scan.details
        | {
            "orientation": "".join(nib.aff2axcodes(scan.affine)),
            "oblique_degrees": round(_oblique_degrees(scan.affine), 1),
            "spacing_mm_ras": spacing,
            "axis": axis,
            "not_finite": bad,
            **({"notes": notes} if notes else {}),
        },
        slope=scan.slope,
        intercept=scan.intercept,
        ends=ends,
        slices=unroll(volume, axis),
    )


def _orientation(affine: NDArray[np.float64], path: Path) -> NDArray[np.float64]:
    """Axis and flip of each stored axis, as nibabel has them. Raises SourceError where they do not span the space."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # Of unit columns, so that it holds for microns and meters.
    if not np.isfinite(affine).all() or not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise SourceError(
            "its affine is singular, so directions and spacing are unknown",
            where=path,
            hint="Correct sform or qform in the header.",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        orientation: NDArray[np.float64] = nib.io_orientation(affine)
    return orientation


def _shape_notes(shape: Sequence[int], affine: NDArray[np.float64], along: int) -> list[str]:
    """What a user should know of the grid: slices that are but lines, spacings that may stand for none, skew axes."""
    notes = []
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    unit = affine[:3, :3] / lengths
    skew = float(np.degrees(np.arcsin(min(1.0, np.abs(unit.T @ unit - np.eye(3)).max()))))
    if skew > 0.5:
        sides = affine[:3, :3].T  # rows: from a voxel to the next along each stored axis, in mm
        apart = [abs(np.linalg.det(sides)) / np.linalg.norm(np.cross(sides[k - 2], sides[k - 1])) for k in range(3)]
        notes.append(
            f"its axes are {skew:.1f} degrees off right angles (gantry tilt?): slices are read as they are, and their "
            f"planes are {' x '.join(f'{step:.4g}' for step in apart)} mm apart along the stored axes"
        )
    thin = [axis for axis, (place, *_) in _ORDER.items() if place != along and shape[place] == 1]
    if thin and shape[along] > 1:
        notes.append(
            f"it is one {thin[0]} slice: use data.axis={thin[0]}; along another axis each step is a line of voxels"
        )
    if np.allclose(lengths, 1.0, rtol=0, atol=1e-6) and max(shape) > 4 * min(shape) > 4:
        voxels = " x ".join(map(str, shape))
        notes.append(f"all spacings are 1 mm, of {voxels} voxels: is that true? Sides and distances follow from it")
    return notes


def _oblique_degrees(affine: NDArray[np.float64]) -> float:
    """The largest angle between a stored axis and the patient's axis that it is taken for."""
    return float(np.degrees(obliquity(affine).max()))


def _intensity_ends(volume: NDArray[Any], data: DataConfig, *, slope: float, intercept: float) -> tuple[float, float]:
    """Values (after slope and intercept) that become 0 and 1; equal where the volume is constant."""
    if data.intensity == "window":
        return data.window_low, data.window_high
    with np.errstate(over="ignore", invalid="ignore"):
        if data.intensity == "zscore":
            mean, sd = _foreground(volume, below=slope < 0)
            reach = data.zscore_range * sd * abs(slope)
            first, last = mean * slope + intercept - reach, mean * slope + intercept + reach
        else:
            wanted = data.percentile_low, data.percentile_high
            found = finite_percentiles(voxel_grid(volume), *wanted, slope=slope, intercept=intercept)
            first, last = found or np.percentile(_some_finite(volume) * slope + intercept, wanted)
        if first == last:
            low, high = _finite_range(volume)
            first, last = sorted((low * slope + intercept, high * slope + intercept))
        spans = np.isfinite(last - first)
    if not spans:
        raise ValueError(f"intensities from {first:g} to {last:g} span more than a number can hold")
    return float(first), float(last)


def voxel_grid(volume: NDArray[Any]) -> NDArray[Any]:
    """Every s-th voxel along each axis, at most some two million."""
    stride = ceil((volume.size / MAX_PERCENTILE_VOXELS) ** (1 / max(volume.ndim, 1)))
    return volume[(slice(None, None, stride),) * volume.ndim]


def _some_finite(volume: NDArray[Any]) -> NDArray[np.float64]:
    """As many of all finite voxels as the grid may have, where it has none."""
    every = ceil(sum(int(np.count_nonzero(np.isfinite(block))) for block in _blocks(volume)) / MAX_PERCENTILE_VOXELS)
    if not every:
        raise ValueError("not one voxel is a finite number")
    found = [block[np.isfinite(block)][::every] for block in _blocks(volume)]
    return np.concatenate(found).astype(np.float64)


def _foreground(volume: NDArray[Any], *, below: bool) -> tuple[float, float]:
    """Mean and sample sd of the stored numbers that lie above the mean of all finite ones; both exact, not sampled.

    below: those below it, which are the high values where the slope is negative. Of a constant volume its value and 0.
    """
    count, total = 0, 0.0
    for block in _blocks(volume):
        finite = _finite(block)
        count, total = count + len(finite), total + float(finite.sum())
    if not count:
        raise ValueError("not one voxel is a finite number")
    threshold = total / count
    inside, first, second = 0, 0.0, 0.0
    for block in _blocks(volume):
        values = _finite(block)
        # From the threshold on: sums of squares of large numbers would lose what they differ by.
        beyond = values[values < threshold if below else values > threshold] - threshold
        inside, first, second = inside + len(beyond), first + float(beyond.sum()), second + float(beyond @ beyond)
    if not inside:
        return threshold, 0.0
    if not np.isfinite(second):
        raise ValueError("its intensities are too large for a standard deviation")
    variance = max(0.0, (second - first * first / inside) / max(inside - 1, 1))
    return threshold + first / inside, variance**0.5


def _finite_range(volume: NDArray[Any]) -> tuple[float, float]:
    """Smallest and largest finite stored number."""
    low, high = np.inf, -np.inf
    for block in _blocks(volume):
        finite = block if volume.dtype.kind in "iub" else block[np.isfinite(block)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high


def _blocks(volume: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """A volume in pieces of some two million voxels, so that working copies stay small.

    Cut along its last axis, not along the one that lies slowest in memory: sums of floats depend on the order, and
    the same anatomy stored otherwise must give the same bits.
    """
    if volume.size <= MAX_PERCENTILE_VOXELS or not volume.ndim:
        yield volume
        return
    step = MAX_PERCENTILE_VOXELS * volume.shape[-1] // volume.size
    for start in range(0, volume.shape[-1], max(step, 1)):
        if step:
            yield volume[..., start : start + step]
        else:
            yield from _blocks(volume[..., start])


def _finite(volume: NDArray[Any]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = volume.astype(np.float64, order="C").ravel()
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
