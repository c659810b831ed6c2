"""The cache of volumes: the same bits, found by content and by nothing else."""

import gzip
import os
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.clips.transforms import prepare_clip
from videogru.data.loading import volume_cache as module
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.volume_cache import VolumeCache
from videogru.data.manifests.corpus import open_corpus
from videogru.data.readers.open import open_source
from videogru.errors import ConfigError, SourceError

SHAPE = (12, 9, 7)


def save(path: Path, seed: int = 0, affine: np.ndarray | None = None) -> Path:
    array = np.random.default_rng(seed).integers(-900, 3000, SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([-1.5, 2, 3, 1]) if affine is None else affine, dtype=array.dtype), path)
    return path


def settings(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(
        **{"frame_size": 16, "num_frames": 4, "cache": "raw", "cache_dir": folder / "cache", **changes}
    ).for_kind("volume")


def entries(data: DataConfig) -> list[Path]:
    assert data.cache_dir is not None
    return sorted(data.cache_dir.glob("*/*.frames"))


def access(data: DataConfig, path: Path, cache: VolumeCache | None = None) -> object:
    with (cache or VolumeCache(data)).open(path) as source:
        return source.details.get("access")


def all_slices(source, data: DataConfig) -> torch.Tensor:
    whole = read_clip(source, data=data.model_copy(update={"sampling": "all"}))
    return prepare_clip(whole, data=data, pixel_aspect=source.pixel_aspect).frames


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_bits_as_without(tmp_path: Path, axis: str, fit: str, channels: int) -> None:
    path = save(tmp_path / "a.nii.gz")
    data = settings(tmp_path, axis=axis, fit=fit, channels=channels, frame_size=20)
    with open_source(path, data=data, kind="volume") as source:
        expected = all_slices(source, data)
        clip = read_clip(source, data=data)
        for _ in range(2):  # just made, found
            with VolumeCache(data).open(path) as cached:
                assert cached.details["access"] == "cached as raw"
                assert torch.equal(all_slices(cached, data), expected)
                assert cached.positions.tolist() == source.positions.tolist()
                assert (cached.extent, cached.unit, cached.kind) == (source.extent, "mm", "volume")
                few = read_clip(cached, data=data)
                assert torch.equal(few.positions, clip.positions)
                wanted = prepare_clip(clip, data=data, pixel_aspect=source.pixel_aspect).frames
                assert torch.equal(prepare_clip(few, data=data).frames, wanted)
    assert len(entries(data)) == 1


def test_real_scans_are_the_same_bits(shared_data: Path, tmp_path: Path) -> None:
    data = settings(tmp_path, frame_size=56)
    for name in ("dipy/aniso_vox.nii.gz", "nibabel/anatomical.nii", "nifti_rs/minimal.hdr", "nifti_rs/zstat1.nii.gz"):
        path = shared_data / "volumes" / name
        with open_source(path, data=data) as source, VolumeCache(data).open(path) as cached:
            assert cached.details["access"] == "cached as raw"
            assert torch.equal(all_slices(cached, data), all_slices(source, data)), name


def test_a_copy_and_a_renamed_file_hit(tmp_path: Path) -> None:
    path, data = save(tmp_path / "a.nii.gz"), settings(tmp_path)
    cache = VolumeCache(data)
    access(data, path, cache)
    (tmp_path / "other").mkdir()
    shutil.copyfile(path, tmp_path / "other" / "b.nii.gz")
    path.rename(tmp_path / "c.nii.gz")
    for again in (tmp_path / "other" / "b.nii.gz", tmp_path / "c.nii.gz"):
        assert cache.entry_of(again) == entries(data)[0]
        assert access(data, again, cache) == "cached as raw"
    assert len(entries(data)) == 1


def test_a_changed_byte_misses_whatever_size_and_time_say(tmp_path: Path) -> None:
    path, data = save(tmp_path / "a.nii"), settings(tmp_path)
    cache = VolumeCache(data)
    with cache.open(path) as source:
        before = all_slices(source, data)
    facts = path.stat()
    content = bytearray(path.read_bytes())
    content[400] ^= 64
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    with cache.open(path) as source, open_source(path, data=data) as file:
        assert torch.equal(all_slices(source, data), all_slices(file, data))
        assert not torch.equal(all_slices(source, data), before)
    assert len(entries(data)) == 2


def test_a_file_is_hashed_once_unless_it_just_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = save(tmp_path / "a.nii"), settings(tmp_path)
    cache, hashed = VolumeCache(data), []
    digest = module.hashlib.file_digest
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *given: hashed.append(1) or digest(*given))
    cache.entry_of(path)
    cache.entry_of(path)
    assert len(hashed) == 2
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 10)
    assert len({cache.entry_of(path) for _ in range(3)}) == 1
    assert len(hashed) == 3


def test_both_files_of_a_pair_count(tmp_path: Path) -> None:
    data = settings(tmp_path)
    array = np.arange(SHAPE[0] * SHAPE[1] * SHAPE[2], dtype=np.int16).reshape(SHAPE)
    nib.save(nib.Nifti1Pair(array, np.eye(4)), tmp_path / "a.hdr")
    access(data, tmp_path / "a.hdr")
    assert VolumeCache(data).entry_of(tmp_path / "a.img") == entries(data)[0]
    content = bytearray((tmp_path / "a.img").read_bytes())
    content[5] ^= 1
    (tmp_path / "a.img").write_bytes(content)
    assert VolumeCache(data).entry_of(tmp_path / "a.hdr") != entries(data)[0]


@pytest.mark.parametrize(
    "change",
    [{"frame_size": 17}, {"fit": "crop"}, {"axis": "coronal"}, {"percentile_low": 2.0}, {"intensity": "window"}],
)
def test_what_shapes_a_slice_names_the_entry(tmp_path: Path, change: dict[str, object]) -> None:
    path = save(tmp_path / "a.nii.gz")
    base = VolumeCache(settings(tmp_path)).entry_of(path)
    assert VolumeCache(settings(tmp_path, **change)).entry_of(path) != base


def test_every_module_that_makes_slices_counts() -> None:
    data = Path(module.__file__).resolve().parents[1]
    assert all(list(data.glob(pattern)) for pattern in module._CODE)
    hashed = {path for pattern in module._CODE for path in data.glob(pattern)}
    assert hashed >= {data / "readers/volume/nifti.py", data / "readers/volume/dicom_geometry.py"}


def test_what_does_not_shape_a_slice_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.nii.gz")
    base = VolumeCache(settings(tmp_path)).entry_of(path)
    for change in (
        {"num_frames": 9},
        {"channels": 3},
        {"window_low": -5.0},
        {"sampling": "uniform"},
        {"decoder": "pyav"},
    ):
        assert VolumeCache(settings(tmp_path, **change)).entry_of(path) == base, change
    monkeypatch.setattr(module, "_code", lambda: "another version")
    assert VolumeCache(settings(tmp_path)).entry_of(path) != base


def test_damage_is_seen_and_mended(tmp_path: Path) -> None:
    path, data = save(tmp_path / "a.nii.gz"), settings(tmp_path)
    with VolumeCache(data).open(path) as source:
        good = all_slices(source, data)
    (entry,) = entries(data)
    whole = entry.read_bytes()
    rng = np.random.default_rng(0)
    for place in [0, 9, 14, 20, 40, len(whole) - 1, *rng.integers(0, len(whole), 30).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        entry.write_bytes(damaged)
        for _ in range(2):
            with VolumeCache(data).open(path) as source:
                assert torch.equal(all_slices(source, data), good)
        assert access(data, path) == "cached as raw"
        assert entry.read_bytes() == whole, place
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        entry.write_bytes(whole[:size])
        assert access(data, path) == "cached as raw"


def test_a_file_that_changes_while_it_is_read_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = save(tmp_path / "a.nii.gz"), settings(tmp_path)
    other = save(tmp_path / "b.nii.gz", seed=1).read_bytes()
    frames = VolumeCache.frames

    def slowly(self, source):
        path.write_bytes(other)
        return frames(self, source)

    monkeypatch.setattr(VolumeCache, "frames", slowly)
    assert access(data, path) is None
    assert not entries(data)


def test_the_bound_and_unreadable_scans(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz")
    tight = settings(tmp_path, cache_gib=1e-6)
    assert access(tight, path) is None
    assert not entries(tight)
    bad = bytearray(gzip.compress(gzip.decompress(path.read_bytes())))
    bad[-5] ^= 1
    path.write_bytes(bad)
    with pytest.raises(SourceError):
        VolumeCache(settings(tmp_path)).open(path)


def test_training_reads_the_same_clips(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "scans" / label).mkdir(parents=True)
        for number in range(3):
            save(tmp_path / "scans" / label / f"{number}.nii.gz", seed=number + 10 * (label == "b"))
    plain = settings(tmp_path, cache="none")
    corpus = open_corpus(plain.model_copy(update={"dataset": str(tmp_path / "scans")}))
    keys = [(epoch, row) for epoch in (0,) for row in range(6)]
    expected = ClipDataset(corpus, data=plain, training=True).__getitems__(keys)
    data = settings(tmp_path)
    for _ in range(2):
        found = ClipDataset(corpus, data=data, training=True).__getitems__(keys)
        assert torch.equal(found.batch.frames, expected.batch.frames)
        assert torch.equal(found.batch.labels, expected.batch.labels)
    assert len(entries(data)) == 6


def test_jpeg_images_and_what_is_in_memory_are_refused(tmp_path: Path) -> None:
    data = settings(tmp_path, dataset="adrenalmnist3d")
    with pytest.raises(ConfigError, match="held in memory"):
        ClipDataset(open_corpus(data), data=data)
    with pytest.raises(ConfigError, match="jpeg is not for volumes"):
        DataConfig(cache="jpeg").for_kind("volume")
    with pytest.raises(ConfigError, match="raw is not for images"):
        DataConfig(cache="raw").for_kind("image")


def test_the_chosen_series_counts(tmp_path: Path) -> None:
    """Two series in one folder share their bytes; which of them was asked for tells them apart."""
    dicom_series = pytest.importorskip("dicom_series")
    folder = tmp_path / "scan"
    array = np.random.default_rng(0).integers(0, 500, SHAPE).astype(np.int16)
    for name, number, voxels in (("a", 1, array), ("b", 2, 500 - array)):
        slices = dicom_series.slices_of(voxels, np.eye(4))
        made = [dicom_series.changed(one, SeriesInstanceUID=f"1.2.{number}", SeriesNumber=number) for one in slices]
        dicom_series.write(folder, made, names=[f"{name}{i}.dcm" for i in range(len(made))])
    for number in ("1", "2", "1"):
        data = settings(tmp_path, series=number)
        with VolumeCache(data).open(folder) as cached, open_source(folder, data=data) as source:
            assert cached.details["access"] == "cached as raw"
            assert torch.equal(all_slices(cached, data), all_slices(source, data)), number
    assert len(entries(settings(tmp_path))) == 2
