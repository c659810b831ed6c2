"""Slices of one DICOM series as a stack: their order, their distances, their affine. No file is read here.

A slice knows its place in the patient (ImagePositionPatient, ImageOrientationPatient), in mm, in LPS: x to the
patient's left, y to posterior, z to superior (DICOM PS3.3, section C.7.6.2.1.1). File names and instance numbers are
not asked: they often follow another order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from videogru.errors import SourceError

# Positions are written with some 6 digits; what lies nearer than this is one place.
SAME_PLACE_MM = 1e-3
# Of the slice distance, that a slice may lie off its place on an even grid.
TOLERANCE = 0.05
# Cosines, and millimeters of pixel spacing relative to themselves, that count as the same.
_SAME = 1e-3
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False, slots=True)
class Slice:
    """One frame of one file.

    position: (3,) mm, LPS, center of the first pixel; orientation: (6,) direction of rows, then of columns; spacing:
    (2,) mm between rows, between columns; thickness: mm from this slice to the next as the file claims, or None.
    """

    file: Path
    frame: int
    rows: int
    columns: int
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: NDArray[np.float64]
    slope: float
    intercept: float
    thickness: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        """For errors."""
        return self.file.name if self.frame == 0 else f"{self.file.name} frame {self.frame + 1}"


class Stack(NamedTuple):
    """Slices in order along their normal; affine: (4, 4) from voxel (column, row, slice) to mm in RAS+."""

    slices: list[Slice]
    affine: NDArray[np.float64]
    details: dict[str, object]


def stack_of(slices: Sequence[Slice], *, where: Path) -> Stack:
    """Order slices along the normal of their plane.

    A slice may lie off an even grid by 5 % of the slice distance (`TOLERANCE`); an even sideways shift from slice to
    slice (a tilted gantry) goes into the affine. Raises SourceError, naming the files, where slices differ in size,
    orientation or pixel spacing, lie at one place, or leave a gap.
    """
    _refuse_mixed(slices, where)
    first = slices[0]
    along_rows, along_columns = _directions(first, where)
    normal = np.cross(along_rows, along_columns)
    heights = np.array([one.position @ normal for one in slices])
    order = np.argsort(heights, kind="stable")
    ordered = [slices[index] for index in order.tolist()]
    heights = heights[order]
    if len(ordered) == 1:
        step, source = first.thickness or (1.0, "none: assumed 1 mm")
        shift = normal * step
        details: dict[str, object] = {"slice_distance_from": source}
    else:
        shift, off = _even_shift(ordered, heights, normal, where)
        details = {"slice_distance_from": "positions", "largest_offset_mm": round(off, 6)}
        lean = float(np.degrees(np.arccos(np.clip(shift @ normal / np.linalg.norm(shift), -1, 1))))
        if lean > 0.1:
            details["gantry_tilt_degrees"] = round(lean, 3)
    affine = np.eye(4)
    affine[:3, 0] = along_rows * first.spacing[1] * _LPS_TO_RAS
    affine[:3, 1] = along_columns * first.spacing[0] * _LPS_TO_RAS
    affine[:3, 2] = shift * _LPS_TO_RAS
    affine[:3, 3] = ordered[0].position * _LPS_TO_RAS
    return Stack(ordered, affine, details)


def _directions(one: Slice, where: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, columns = one.orientation[:3], one.orientation[3:]
    lengths = float(np.linalg.norm(rows)), float(np.linalg.norm(columns))
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(rows @ columns))) > 0.01:
        raise SourceError(
            f"ImageOrientationPatient {_shown(one.orientation)} of {one.name} holds no two directions at right angles",
            where=where,
            hint="Leave this series out, or correct the tag.",
        )
    return rows / lengths[0], columns / lengths[1]


def _refuse_mixed(slices: Sequence[Slice], where: Path) -> None:
    first = slices[0]
    sizes = Counter((one.columns, one.rows) for one in slices)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {w}x{h}" for (w, h), count in sizes.most_common())
        raise SourceError(f"its slices differ in size: {found}", where=where, hint=_SORT_HINT)
    for what, values in (
        ("orientation", [one.orientation for one in slices]),
        ("pixel spacing", [one.spacing for one in slices]),
    ):
        allowed = _SAME * (1.0 if what == "orientation" else float(values[0].max()))
        groups: list[tuple[NDArray[np.float64], int]] = []
        for value in values:
            known = next((k for k, (other, _) in enumerate(groups) if np.abs(value - other).max() <= allowed), None)
            if known is None:
                groups.append((value, 1))
                if len(groups) > 8:
                    break
            else:
                groups[known] = (groups[known][0], groups[known][1] + 1)
        if len(groups) > 1:
            found = ", ".join(f"{count} with {_shown(value)}" for value, count in groups[:4])
            more = ", ..." if len(groups) > 4 else ""
            raise SourceError(
                f"its slices differ in {what}: {found}{more}; the first is {first.name}", where=where, hint=_SORT_HINT
            )


_SORT_HINT = "These are several stacks, such as a localizer: put each into a folder of its own."


def _even_shift(
    ordered: list[Slice], heights: NDArray[np.float64], normal: NDArray[np.float64], where: Path
) -> tuple[NDArray[np.float64], float]:
    """(3,) mm from slice to slice, and the largest distance of a slice from its place on the even grid."""
    steps = np.diff(heights)
    for (one, other), step in zip(pairwise(ordered), steps.tolist(), strict=True):
        if step < SAME_PLACE_MM:
            raise SourceError(
                f"{one.name} and {other.name} lie at the same place, {one.position @ normal:.3f} mm along the normal",
                where=where,
                hint="Two copies, echoes or time points are in one series: leave one of them in the folder.",
            )
    usual = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - usual) > TOLERANCE * usual)
    if len(odd):
        places = []
        for index in odd[:3].tolist():
            lost = steps[index] / usual - 1
            # A whole number of slices is missing, or the distances are simply uneven.
            why = f" ({round(lost)} missing)" if lost > 0.5 and abs(lost - round(lost)) < 0.1 else ""
            names = f"{ordered[index].name} and {ordered[index + 1].name}"
            places.append(f"{steps[index]:.3f} mm between {names}{why}")
        more = f" and at {len(odd) - 3} more places" if len(odd) > 3 else ""
        raise SourceError(
            f"its {len(ordered)} slices are {usual:.3f} mm apart, but {'; '.join(places)}{more}",
            where=where,
            hint="Add the missing slices, or resample the series to even distances first.",
        )
    positions = np.stack([one.position for one in ordered])
    shift: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(ordered) - 1)
    off = np.linalg.norm(positions - positions[0] - np.arange(len(ordered))[:, None] * shift, axis=1)
    worst = int(off.argmax())
    if off[worst] > max(TOLERANCE * float(usual), SAME_PLACE_MM):
        raise SourceError(
            f"{ordered[worst].name} lies {off[worst]:.3f} mm off the line of the others",
            where=where,
            hint="Resample the series to an even grid first.",
        )
    return shift, float(off[worst])


def _shown(values: NDArray[np.float64]) -> str:
    return "\\".join(f"{value + 0.0:g}" for value in values)
