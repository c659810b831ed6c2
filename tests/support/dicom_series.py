"""Writes DICOM series whose voxels and places are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

MR_IMAGE, ENHANCED_MR, REPORT = (
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.88.11",
)
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
Array = np.ndarray


def plain(kind: str = MR_IMAGE, series: str = "1.2.3", **tags: Any) -> FileDataset:
    """An object without pixels; a tag of None is left out."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    found.SOPClassUID = kind
    found.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    found.Modality = "MR"
    found.SeriesInstanceUID = series
    found.SeriesNumber = 3
    found.SeriesDescription = "made"
    return changed(found, **tags)


def changed(found: FileDataset, **tags: Any) -> FileDataset:
    """The same with other tags; None takes one out."""
    for tag, value in tags.items():
        if value is None:
            if tag in found:
                delattr(found, tag)
        else:
            setattr(found, tag, value)
    return found


def with_pixels(found: FileDataset, pixels: Array) -> FileDataset:
    """Integers (rows columns) or (frames rows columns)."""
    found.Rows, found.Columns = pixels.shape[-2:]
    found.SamplesPerPixel = 1
    found.PhotometricInterpretation = "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    found.BitsAllocated, found.BitsStored, found.HighBit = bits, bits, bits - 1
    found.PixelRepresentation = int(pixels.dtype.kind == "i")
    found.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    found["PixelData"].VR = "OB" if bits == 8 else "OW"
    return found


def place_of(affine: Array, step: float) -> dict[str, list[float]]:
    """Where a slice lies: its number along the third axis of (4, 4) RAS+."""
    columns = affine[:3, :3] * RAS_TO_LPS[:, None]
    sizes = np.linalg.norm(columns, axis=0)
    corner = (affine @ [0, 0, step, 1])[:3] * RAS_TO_LPS
    return {
        "ImagePositionPatient": [float(f"{value:.9g}") for value in corner],
        "ImageOrientationPatient": [float(f"{value:.9g}") for value in (columns[:, :2] / sizes[:2]).T.ravel()],
        "PixelSpacing": [float(sizes[1]), float(sizes[0])],
    }


def slices_of(array: Array, affine: Array, **tags: Any) -> list[FileDataset]:
    """One object for each slice along the third axis of voxels (X Y Z)."""
    found = []
    for step in range(array.shape[2]):
        one = plain(InstanceNumber=step + 1, **place_of(affine, step))
        found.append(changed(with_pixels(one, np.ascontiguousarray(array[:, :, step].T)), **tags))
    return found


def write(folder: Path, objects: list[FileDataset], *, names: list[str] | None = None, seed: int = 0) -> Path:
    """Under names whose order says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(objects))
    for place, one in zip(order.tolist(), objects, strict=True):
        one.save_as(folder / (names[place] if names else f"{place:04d}.dcm"), enforce_file_format=True)
    return folder


def enhanced(array: Array, affine: Array, order: list[int], *, shared: bool = True, **tags: Any) -> FileDataset:
    """All slices of voxels (X Y Z) as frames of one object, in this order."""
    found = plain(ENHANCED_MR, NumberOfFrames=len(order), InstanceNumber=1)
    with_pixels(found, np.ascontiguousarray(array[:, :, order].transpose(2, 1, 0)))
    per_frame = []
    for step in order:
        place = place_of(affine, step)
        group = Dataset()
        group.PlanePositionSequence = [Dataset()]
        group.PlanePositionSequence[0].ImagePositionPatient = place["ImagePositionPatient"]
        if not shared or step == order[0]:
            fixed = group if not shared else Dataset()
            fixed.PlaneOrientationSequence = [Dataset()]
            fixed.PlaneOrientationSequence[0].ImageOrientationPatient = place["ImageOrientationPatient"]
            fixed.PixelMeasuresSequence = [Dataset()]
            fixed.PixelMeasuresSequence[0].PixelSpacing = place["PixelSpacing"]
            if shared:
                found.SharedFunctionalGroupsSequence = [fixed]
        per_frame.append(group)
    found.PerFrameFunctionalGroupsSequence = per_frame
    return changed(found, **tags)
