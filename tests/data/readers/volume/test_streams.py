"""Stored numbers against nibabel's; streams that lie, end early or go on for ever."""

import gzip
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from videogru.config import DataConfig
from videogru.data.readers.file_types import kind_of_name
from videogru.data.readers.volume import nifti as volume_nifti
from videogru.data.readers.volume.nifti import read_nifti
from videogru.data.readers.volume.volume import open_volume
from videogru.errors import SourceError

HEADER = 352


def noise(shape: tuple[int, ...] = (20, 21, 22)) -> np.ndarray:
    return np.random.default_rng(0).integers(-3000, 30000, shape).astype(np.int16)


def save(path: Path, array: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4), dtype=array.dtype), path)
    return path


def packed(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, 1))
    return path


def voxels(path: Path) -> np.ndarray:
    return read_nifti(path, data=DataConfig()).voxels


def test_the_numbers_are_those_of_nibabel(shared_data: Path) -> None:
    read = 0
    for path in sorted((shared_data / "volumes").rglob("*")):
        dicom = path.suffix == ".dcm"
        if kind_of_name(path.name) == "volume" and not dicom and len(shape := nib.load(path).shape) == 3:
            expected = np.asarray(nib.load(path).dataobj.get_unscaled())
            found = voxels(path)
            assert found.dtype == expected.dtype and found.shape == shape, path
            assert found.tobytes() == expected.tobytes(), path
            read += 1
    assert read > 20


def test_every_bit_of_a_stream_counts(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", noise((5, 6, 7))).read_bytes()
    whole = bytearray(gzip.compress(content, 1, mtime=0))
    path = tmp_path / "a.nii.gz"
    harmless = []
    # The first ten bytes are gzip's own header: time and system say nothing of the content.
    for place in range(10, len(whole)):
        whole[place] ^= 1 << (place % 8)
        path.write_bytes(whole)
        try:
            open_volume(path, data=DataConfig())
        except SourceError:
            pass
        else:
            assert np.array_equal(voxels(path), noise((5, 6, 7)))
            harmless.append(place)
        whole[place] ^= 1 << (place % 8)
    # Lengths of codes that no byte uses, and the bits that fill up the last byte before the checksum.
    assert len(harmless) < 10
    path.write_bytes(whole)
    assert np.array_equal(voxels(path), noise((5, 6, 7)))


@pytest.mark.parametrize("kept", [0, 5, 10, 100, -9, -8, -4, -1])
def test_a_stream_that_ends_early(tmp_path: Path, kept: int) -> None:
    path = save(tmp_path / "a.nii.gz", noise())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError):
        open_volume(path, data=DataConfig())


def test_the_body_under_a_checksum_of_other_bytes(tmp_path: Path) -> None:
    content = bytearray(save(tmp_path / "a.nii", noise()).read_bytes())
    checksum = zlib.crc32(content).to_bytes(4, "little")
    content[-1] ^= 1
    stream = gzip.compress(bytes(content), 1)
    (tmp_path / "b.nii.gz").write_bytes(stream[:-8] + checksum + stream[-4:])
    assert nib.load(tmp_path / "b.nii.gz").shape == (20, 21, 22)
    with pytest.raises(SourceError, match="CRC"):
        open_volume(tmp_path / "b.nii.gz", data=DataConfig())


def test_what_follows_the_voxels_is_checked_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = save(tmp_path / "a.nii", noise()).read_bytes()
    path = packed(tmp_path / "b.nii.gz", content + bytes(1000))
    assert np.array_equal(voxels(path), noise())
    monkeypatch.setattr(volume_nifti, "MAX_EXTRA_BYTES", 999)
    with pytest.raises(SourceError, match="goes on"):
        open_volume(path, data=DataConfig())


def test_a_bomb_takes_no_more_memory_than_it_claims(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", noise()).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(content + bytes(300 * 2**20), 9))
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(SourceError, match="goes on"):
        open_volume(path, data=DataConfig())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_the_header_of_a_pair_is_checked_too(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(noise(), np.eye(4)), tmp_path / "a.hdr.gz")
    assert np.array_equal(voxels(tmp_path / "a.hdr.gz"), noise())
    stream = bytearray((tmp_path / "a.hdr.gz").read_bytes())
    stream[-6] ^= 1
    (tmp_path / "a.hdr.gz").write_bytes(stream)
    with pytest.raises(SourceError):
        open_volume(tmp_path / "a.hdr.gz", data=DataConfig())
