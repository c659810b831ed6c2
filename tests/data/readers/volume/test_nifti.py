"""Files of scans by nibabel: formats, volumes of 4-D files, affines that disagree, and headers that lie about size."""

import gzip
import tracemalloc
from itertools import product
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

MIB = 2**20
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 0, 2.5, -3], [0, 2.0, 0, 7], [0, 0, 0, 1]])  # LSA


def noise(*shape: int, dtype: str = "<i2") -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 30_000, shape).astype(dtype)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, affine, dtype=array.dtype), path)
    return path


def with_bytes(path: Path, **fields: bytes) -> Path:
    """The uncompressed NIfTI-1 file with other bytes at the places of some fields."""
    at = {"dim": 40, "vox_offset": 108, "xyzt_units": 123, "qform_code": 252, "quatern_b": 256, "qoffset_x": 268}
    content = bytearray(path.read_bytes())
    for name, value in fields.items():
        content[at[name] : at[name] + len(value)] = value
    path.write_bytes(content)
    return path


def packed(path: Path, *, then: bytes = b"") -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes() + then, 1))
    return target


def slices(path: Path, data: DataConfig) -> np.ndarray:
    with open_volume(path, data=data) as source:
        return source.read(range(len(source.positions))).numpy()


# Formats


def test_the_same_voxels_in_every_format_are_the_same_slices(tmp_path: Path) -> None:
    voxels = noise(6, 7, 8)
    image = nib.Nifti1Image(voxels, AFFINE)
    files = [tmp_path / name for name in ("a.nii", "b.nii.gz", "c.hdr", "d.img.gz", "e.mgh", "f.mgz", "g.nii", "h.nii")]
    for file, kind in zip(
        files,
        [
            *(nib.Nifti1Image, nib.Nifti1Image, nib.Nifti1Pair, nib.Nifti1Pair),
            *(nib.MGHImage, nib.MGHImage, nib.Nifti2Image, nib.Nifti1Image),
        ],
        strict=True,
    ):
        kind(voxels if file.name != "h.nii" else voxels.astype(">f8"), AFFINE).to_filename(file)
    opened = [*files, tmp_path / "c.img", tmp_path / "d.hdr.gz"]
    for axis, intensity in product(("axial", "coronal", "sagittal"), ("percentile", "zscore")):
        data = DataConfig(axis=axis, intensity=intensity)  # type: ignore[arg-type]
        with open_volume(files[0], data=data) as source:
            truth, positions = source.read(range(len(source.positions))).numpy(), source.positions
        for path in opened:
            np.testing.assert_allclose(slices(path, data), truth, atol=1e-7, err_msg=path.name)
            with open_volume(path, data=data) as source:
                np.testing.assert_allclose(source.positions, positions, rtol=1e-6)
                assert source.details["orientation"] == "".join(nib.aff2axcodes(image.affine)) == "LSA"
    assert read_nifti(files[6], data=DataConfig()).details["format"] == "Nifti2Image"


def test_analyze_is_read_as_nibabel_assumes_it(tmp_path: Path) -> None:
    image = nib.AnalyzeImage(noise(6, 7, 8), None)
    image.header.set_zooms((1.5, 2.0, 2.5))
    image.to_filename(tmp_path / "a.img")
    assumed = nib.load(tmp_path / "a.img").affine
    twin = save(tmp_path / "b.nii", noise(6, 7, 8), assumed)
    for name in ("a.img", "a.hdr"):
        assert np.array_equal(slices(tmp_path / name, DataConfig()), slices(twin, DataConfig()))
        with open_volume(tmp_path / name, data=DataConfig()) as source:
            assert source.details["orientation_from"] == "none (Analyze): assumed"
            assert source.positions[1] == 2.5


def test_integers_stay_as_they_are_stored(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(5, 6, 7), AFFINE)
    image.header.set_slope_inter(2.0, -1024.0)
    for name in ("a.nii", "b.nii.gz"):
        nib.save(image, tmp_path / name)
        scan = read_nifti(tmp_path / name, data=DataConfig())
        assert scan.voxels.dtype == np.int16 and np.array_equal(scan.voxels, noise(5, 6, 7))
        assert (scan.slope, scan.intercept) == (2.0, -1024.0)


# Volumes of 4-D files


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.img.gz"])
def test_one_volume_or_the_mean_of_several(tmp_path: Path, name: str) -> None:
    path, series = tmp_path / name, noise(5, 6, 7, 4)
    kind = {"a.mgz": nib.MGHImage, "a.img.gz": nib.Nifti1Pair}.get(name, nib.Nifti1Image)
    kind(series, AFFINE).to_filename(path)
    for wanted in range(4):
        scan = read_nifti(path, data=DataConfig(volume=wanted))
        assert np.array_equal(scan.voxels, series[..., wanted])
        assert (scan.details["volumes"], scan.details["volume"]) == (4, wanted)
    mean = read_nifti(path, data=DataConfig(volume="mean")).voxels
    assert mean.dtype == np.float64
    np.testing.assert_allclose(mean, series.mean(axis=3, dtype=np.float64), rtol=1e-14)
    with pytest.raises(SourceError, match=r"holds 4 volumes \(shape 5 x 6 x 7 x 4\)") as caught:
        open_volume(path, data=DataConfig())
    assert "--volume N (0 to 3)" in str(caught.value.hint) and "--volume mean" in str(caught.value.hint)
    with pytest.raises(SourceError, match="there is no volume 4") as caught:
        open_volume(path, data=DataConfig(volume=4))
    assert "0 to 3" in str(caught.value.hint)


def test_a_3d_file_is_its_own_only_volume(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise(5, 6, 7))
    for wanted in (0, "mean"):
        scan = read_nifti(path, data=DataConfig(volume=wanted))  # type: ignore[arg-type]
        assert scan.voxels.dtype == np.int16 and np.array_equal(scan.voxels, noise(5, 6, 7))
    with pytest.raises(SourceError, match="holds one volume, there is no volume 1"):
        open_volume(path, data=DataConfig(volume=1))


def test_more_axes_count_in_the_order_of_the_file(tmp_path: Path) -> None:
    series = noise(4, 5, 6, 2, 3)
    path = save(tmp_path / "a.nii.gz", series)
    for last, first in product(range(3), range(2)):
        scan = read_nifti(path, data=DataConfig(volume=first + 2 * last))
        assert np.array_equal(scan.voxels, series[..., first, last])
    np.testing.assert_allclose(read_nifti(path, data=DataConfig(volume="mean")).voxels, series.mean((3, 4)), rtol=1e-14)


def test_a_mean_of_scaled_volumes_and_of_holes(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(4, 5, 6, 3), AFFINE)
    image.header.set_slope_inter(-0.25, 9.0)
    nib.save(image, tmp_path / "a.nii")
    scan = read_nifti(tmp_path / "a.nii", data=DataConfig(volume="mean"))
    truth = nib.load(tmp_path / "a.nii").get_fdata().mean(axis=3)
    np.testing.assert_allclose(scan.voxels * scan.slope + scan.intercept, truth, rtol=1e-12)
    holed = noise(4, 5, 6, 3, dtype="<f4")
    holed[0, 0, 0, 1], holed[1, 1, 1] = np.nan, (np.inf, -np.inf, 0)
    path = save(tmp_path / "b.nii", holed)
    with open_volume(path, data=DataConfig(volume="mean")) as source:
        assert source.details["not_finite"] == 2
    with open_volume(path, data=DataConfig(volume=2)) as source:
        assert source.details["not_finite"] == 0


def test_a_cut_off_series_is_no_series(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise(9, 9, 9, 5))
    path.write_bytes(path.read_bytes()[:-2000])
    for wanted in (0, 4, "mean"):
        with pytest.raises(SourceError):
            open_volume(path, data=DataConfig(volume=wanted))  # type: ignore[arg-type]


# sform and qform


def test_the_sform_counts_before_the_qform_and_both_are_compared(tmp_path: Path) -> None:
    turned = np.diag([2.0, -2.0, 2.0, 1.0])
    shifted = AFFINE.copy()
    shifted[:3, 3] += (3, 0, 4)
    for sform, qform, apart, word in (
        (AFFINE, AFFINE, None, None),
        (AFFINE, AFFINE + np.outer([0.05, 0, 0, 0], [0, 0, 0, 1]), None, None),
        (AFFINE, shifted, 5.0, "5 mm"),
        (np.eye(4), turned, None, "RPS"),
    ):
        image = nib.Nifti1Image(noise(5, 6, 7), sform)
        image.set_sform(sform, 1)
        image.set_qform(qform, 1)
        nib.save(image, tmp_path / "a.nii")
        scan = read_nifti(tmp_path / "a.nii", data=DataConfig())
        np.testing.assert_allclose(scan.affine, sform, atol=1e-6)
        assert scan.details["orientation_from"] == "sform"
        said = scan.details.get("orientation_disagreement_mm")
        if word is None:
            assert said is None and "notes" not in scan.details
            continue
        corners = [np.array([x, y, z, 1]) for x in (0, 4) for y in (0, 5) for z in (0, 6)]
        truth = max(float(np.linalg.norm((sform - qform) @ corner)) for corner in corners)
        assert said == pytest.approx(truth, abs=2e-3) and (apart is None or truth == pytest.approx(apart))
        (note,) = scan.details["notes"]  # type: ignore[misc]
        assert word in note and "sform is used" in note


def test_each_form_alone_and_none(tmp_path: Path) -> None:
    other = np.diag([2.0, 3.0, 4.0, 1.0])
    for s_code, q_code, source in ((0, 1, "qform"), (2, 0, "sform"), (0, 0, "none: assumed")):
        header = nib.Nifti1Image(noise(5, 6, 7), AFFINE).header
        header.set_qform(AFFINE, q_code)
        header.set_sform(other, s_code)
        nib.Nifti1Image(noise(5, 6, 7), None, header).to_filename(tmp_path / "a.nii")
        scan = read_nifti(tmp_path / "a.nii", data=DataConfig())
        assert scan.details["orientation_from"] == source
        np.testing.assert_allclose(scan.affine, nib.load(tmp_path / "a.nii").affine)
        if source == "sform":
            np.testing.assert_allclose(scan.affine, other)


def test_a_qform_that_cannot_be_read_is_only_noted_beside_a_good_sform(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(5, 6, 7), AFFINE)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "a.nii")
    path = with_bytes(tmp_path / "a.nii", quatern_b=np.array([3, 3, 3], "<f4").tobytes())
    scan = read_nifti(path, data=DataConfig())
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-6)
    assert "qform cannot be read" in scan.details["notes"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("code", "factor"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001), (2 + 8, 1.0), (3 + 16, 0.001)]
)
def test_lengths_are_in_mm_whatever_the_header_counts_in(tmp_path: Path, code: int, factor: float) -> None:
    path = with_bytes(save(tmp_path / "a.nii", noise(5, 6, 7)), xyzt_units=bytes([code]))
    with open_volume(path, data=DataConfig(axis="auto")) as source:
        assert source.details["axis"] == "coronal"
        assert source.positions[1] == pytest.approx(2.5 * factor)
    np.testing.assert_allclose(read_nifti(path, data=DataConfig()).affine[:3], AFFINE[:3] * factor, rtol=1e-6)


# Sizes that lie, and memory


def peak_of(path: Path, data: DataConfig, frames: int | None) -> tuple[int, str | None]:
    """Largest memory while a file is opened and some slices are read, and the error there was, if any."""
    tracemalloc.start()
    try:
        with open_volume(path, data=data) as source:
            source.read(range(len(source.positions))[:frames])
        said = None
    except SourceError as error:
        said = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, said


@pytest.mark.parametrize("dtype", ["<i2", "<f8"])
def test_what_is_allocated_is_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """One volume of a series, the mean, a clip and all slices: the limit lies just above what the file takes."""
    monkeypatch.setattr("videogru.data.readers.volume.volume.MAX_PERCENTILE_VOXELS", 50_000)
    path = save(tmp_path / "a.nii.gz", noise(160, 160, 120, 3, dtype=dtype))
    voxels, size = 160 * 160 * 120, np.dtype(dtype).itemsize
    for wanted, sampling, count in ((1, "uniform", 16), (1, "all", 120), ("mean", "uniform", 16)):
        needed = voxels * (size + (8 if wanted == "mean" else 0)) + 4 * 160 * 160 * count
        settings = {"volume": wanted, "sampling": sampling, "axis": "sagittal"}
        data = DataConfig(**settings, max_memory_gib=needed * 1.001 / 2**30)  # type: ignore[arg-type]
        frames = 16 if sampling == "uniform" else None
        peak, said = peak_of(path, data, frames)
        assert said is None
        # Blocks and buffers come on top.
        assert voxels * size < peak < needed + 6 * MIB
        peak, said = peak_of(path, data.model_copy(update={"max_memory_gib": needed * 0.999 / 2**30}), frames)
        assert said and "GiB of memory, the limit is" in said and "--max-memory" in said
        assert peak < 6 * MIB


def test_the_advice_on_memory_is_enough(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.zeros((600, 600, 300), np.uint8))
    with pytest.raises(SourceError, match="limit is 0.1") as caught:
        open_volume(path, data=DataConfig(max_memory_gib=0.1))
    advice = float(str(caught.value.hint).split("--max-memory ")[1].split(" ")[0])
    open_volume(path, data=DataConfig(max_memory_gib=advice)).close()


@pytest.mark.parametrize("volume", [None, 0, "mean"])
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path: Path, volume: object) -> None:
    plain = save(tmp_path / "a.nii", noise(40, 40, 40))
    # More than any gzip stream of this size can hold, and 16 GiB, which zeros that follow make possible.
    for side in (30_000, 2000):
        path = with_bytes(plain, dim=np.array([3, side, side, side], "<i2").tobytes())
        for file in (path, packed(path, then=bytes(64 * MIB) if side == 2000 else b"")):
            peak, said = peak_of(file, DataConfig(volume=volume), 1)  # type: ignore[arg-type]
            assert said and ("claims" in said or "the limit is 4" in said), said
            assert peak < 4 * MIB
    # The ratio alone would let this one pass.
    (tmp_path / "b.nii.gz").write_bytes(
        gzip.compress(path.read_bytes(), 1) + gzip.compress(np.random.default_rng(0).bytes(16 * MIB), 0)
    )
    peak, said = peak_of(tmp_path / "b.nii.gz", DataConfig(volume=volume), 1)  # type: ignore[arg-type]
    assert said and "would take 15.1 GiB of memory, the limit is 4" in said
    assert peak < 4 * MIB


def test_a_stream_that_goes_on_and_on_is_refused(tmp_path: Path) -> None:
    plain = save(tmp_path / "a.nii", noise(8, 8, 8))
    path = packed(plain, then=bytes(volume_nifti.MAX_EXTRA_BYTES + MIB))
    assert path.stat().st_size < MIB
    peak, said = peak_of(path, DataConfig(), 1)
    assert said and "goes on for more than 64 MiB" in said
    assert peak < 8 * MIB
    # A little more than the voxels is harmless.
    assert np.array_equal(slices(packed(plain, then=bytes(MIB)), DataConfig()), slices(plain, DataConfig()))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".hdr", ".hdr.gz"])
def test_header_extensions_that_claim_too_much(tmp_path: Path, ending: str) -> None:
    image = (nib.Nifti1Pair if "hdr" in ending else nib.Nifti1Image)(noise(8, 8, 8), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"seen"))
    image.to_filename(tmp_path / f"good{ending}")
    slices(tmp_path / f"good{ending}", DataConfig())
    plain = tmp_path / ("a.hdr" if "hdr" in ending else "a.nii")
    image.to_filename(plain)
    content = bytearray(plain.read_bytes())
    content[352:356] = (2**30).to_bytes(4, "little")
    plain.write_bytes(bytes(content) + bytes(100 * MIB))
    path = packed(plain) if ending.endswith("gz") else plain
    if ending == ".hdr.gz":
        packed(tmp_path / "a.img")
    for name in (path.name, path.name.replace("hdr", "img")):
        peak, said = peak_of(tmp_path / name, DataConfig(), 1)
        assert said and "extensions claim" in said
        assert peak < 4 * MIB


def test_a_negative_offset_is_no_place(tmp_path: Path) -> None:
    nib.Nifti1Pair(noise(8, 8, 8), AFFINE).to_filename(tmp_path / "a.img")
    with_bytes(tmp_path / "a.hdr", vox_offset=np.array([-64], "<f4").tobytes())
    with pytest.raises(SourceError):
        open_volume(tmp_path / "a.img", data=DataConfig())


# Real files


def volumes_of(folder: Path) -> list[Path]:
    """Files but those of DICOM, which nibabel does not read."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".dcm")
    return sorted(path for path in files if kind_of_name(path.name) == "volume")


def test_every_real_scan_is_what_nibabel_reads(shared_data: Path) -> None:
    """All of the real files, every volume kind of 4-D files; truth: get_fdata of the closest canonical image."""
    order = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
    read, colors = 0, []
    for path in volumes_of(shared_data / "volumes"):
        image = nib.load(path)
        if image.get_data_dtype().fields is not None:
            with pytest.raises(SourceError, match=r"colors \(RGBA\)"):
                open_volume(path, data=DataConfig(volume=0))
            colors.append(path.name)
            continue
        values = nib.as_closest_canonical(image).get_fdata()
        series = values.reshape(*values.shape[:3], -1, order="F")
        last = series.shape[3] - 1
        for wanted in (None,) if last == 0 else (0, last, "mean"):
            truth = series.mean(axis=3) if wanted == "mean" else series[..., wanted or 0]
            for axis in order:
                data = DataConfig(axis=axis, volume=wanted, percentile_low=0, percentile_high=100)  # type: ignore[arg-type]
                with open_volume(path, data=data) as source:
                    some = sorted({0, len(source.positions) // 2, len(source.positions) - 1})
                    said = source.read(some)[:, 0].numpy()
                if truth.size > 2_000_000:
                    stride = int(np.ceil((truth.size / 2_000_000) ** (1 / 3)))
                    ends = truth[::stride, ::stride, ::stride]
                else:
                    ends = truth
                low, high = np.nanmin(ends), np.nanmax(ends)
                rolled = truth.transpose(order[axis])[:, ::-1, ::-1][some]
                wished = np.clip((rolled - low) / (high - low), 0, 1) if high > low else np.zeros_like(rolled)
                np.testing.assert_allclose(said, np.nan_to_num(wished), atol=2e-6, err_msg=f"{path} {axis} {wanted}")
                read += 1
    assert colors == ["4D.nii"] and read > 100


@pytest.mark.parametrize("volume", [None, 0, "mean"])
def test_hostile_files_are_errors(shared_data: Path, volume: object) -> None:
    """None of them holds one whole scan of numbers: each is refused, in a message that names it."""
    paths = [path for path in sorted((shared_data / "hostile" / "nifti").iterdir()) if path.is_file()]
    assert len(paths) == 11
    for path in paths:
        with pytest.raises(SourceError) as caught:
            open_volume(path, data=DataConfig(volume=volume))  # type: ignore[arg-type]
        assert str(path) in str(caught.value)


def test_a_name_that_says_other_than_the_first_bytes(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3), np.eye(4))
    nib.save(image, tmp_path / "plain.nii")
    nib.save(image, tmp_path / "packed.nii.gz")
    (tmp_path / "plain.nii").rename(tmp_path / "a.nii.gz")
    (tmp_path / "packed.nii.gz").rename(tmp_path / "b.nii")
    for name, what, other in (
        ("a.nii.gz", "is named as a gzip stream, and is none", "a.nii"),
        ("b.nii", "is a gzip stream, and is not named so", "b.nii.gz"),
    ):
        with pytest.raises(SourceError, match=what) as caught:
            open_volume(tmp_path / name, data=DataConfig())
        assert caught.value.hint == f"Rename it: {other}"
