"""What `videogru data info FILE` says of one source, in plain values: a scan above all."""

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.readers.source import FrameSource
from videogru.data.readers.volume.percentiles import finite_percentiles
from videogru.data.readers.volume.volume import Volume, chosen_axis, unroll, voxel_grid

_PERCENTILES = ((1.0, 99.0), (5.0, 95.0), (50.0, 50.0))


def ras_voxels(source: Volume) -> Shaped[np.ndarray, "X Y Z"]:
    """The stored voxels of a scan that was opened with data.axis=axial, in RAS; a view. Undoes `unroll`."""
    assert source.slices is not None and source.details["axis"] == "axial"
    return source.slices[:, ::-1, ::-1].transpose(2, 1, 0)


def spacing_of(source: Volume) -> tuple[float, float, float]:
    """Mm between voxels to the patient's right, to anterior, to superior."""
    spacing = source.details["spacing_mm_ras"]
    assert isinstance(spacing, list)
    right, anterior, superior = (float(size) for size in spacing)
    return right, anterior, superior


def describe_scan(source: Volume, *, data: DataConfig) -> dict[str, object]:
    """Facts of a scan that was opened with data.axis=axial, and what a model with `data` would see of it.

    values: of all finite voxels after slope and intercept; percentiles of every s-th voxel along each axis where there
    are more than two million. model: the axis that `data.axis` chooses, its slices and where they lie.
    """
    volume, spacing = ras_voxels(source), spacing_of(source)
    details = {name: value for name, value in source.details.items() if name not in ("axis", "spacing_mm_ras", "notes")}
    low, high, mean = _range_and_mean(volume, source.slope, source.intercept)
    percentiles: dict[str, object] = {}
    for pair in _PERCENTILES:
        found = finite_percentiles(voxel_grid(volume), *pair, slope=source.slope, intercept=source.intercept)
        percentiles |= {f"p{rank:g}": value for rank, value in zip(pair, found or (), strict=False)}
    axis = chosen_axis(data.axis, spacing)
    steps, height, width = unroll(volume, axis).shape
    step = spacing[["sagittal", "coronal", "axial"].index(axis)]
    return {
        "source": str(source.path),
        "kind": "volume",
        **details,
        "voxels right_anterior_superior": " x ".join(map(str, volume.shape)),
        "spacing_mm": " x ".join(f"{size:.4g}" for size in spacing),
        "extent_mm": " x ".join(f"{side * size:.4g}" for side, size in zip(volume.shape, spacing, strict=True)),
        "values": {"min": low, "max": high, "mean": mean, **dict(sorted(percentiles.items(), key=_rank))},
        "model": {
            "axis": axis + (" (the thickest)" if data.axis == "auto" else ""),
            "slices": steps,
            "slice": f"{height} x {width} voxels",
            "step_mm": step,
            "length_mm": steps * step,
            "black_to_white": list(source.ends),
        },
        "notes": source.details.get("notes"),
    }


def describe_steps(source: FrameSource) -> dict[str, object]:
    """Facts of a video or image."""
    facts: dict[str, object] = {"source": str(source.path), "kind": source.kind, **source.details}
    if source.unit == "seconds":
        length = source.extent[1] - source.extent[0]
        facts |= {"frames": len(source.positions), "seconds": length, "pixel_aspect": source.pixel_aspect}
        if len(source.positions) > 1:
            facts["frames_per_second"] = 1 / float(np.median(np.diff(source.positions)))
    return facts


def _rank(entry: tuple[str, object]) -> float:
    return float(entry[0][1:])


def _range_and_mean(volume: NDArray[np.generic], slope: float, intercept: float) -> tuple[float, float, float]:
    low, high, total, count = np.inf, -np.inf, 0.0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for part in volume.T:  # slice by slice, so that copies stay small
            values = part.astype(np.float64) * slope + intercept
            finite = values[np.isfinite(values)]
            if len(finite):
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                total, count = total + float(finite.sum()), count + len(finite)
    return low, high, total / max(count, 1)
