"""Volume reader: hand loops over patient coordinates, nibabel's affines, and files that lie."""

import gzip
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from videogru.config import DataConfig
from videogru.data.readers.file_types import kind_of_name
from videogru.data.readers.volume import volume as volume_module
from videogru.data.readers.volume.volume import open_volume, to_unit_range, unroll
from videogru.errors import SourceError

AXES = ("axial", "coronal", "sagittal")
SPACING = (1.5, 2.0, 3.0)  # mm along patient x, y, z
ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for flips in product((0, 1), repeat=3)
]
FULL = DataConfig(percentile_low=0, percentile_high=100)


def ras_array() -> np.ndarray:
    """4 x 5 x 6 voxels, each with a number of its own."""
    return np.random.default_rng(0).permutation(120).reshape(4, 5, 6).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **header: float) -> Path:
    image = nib.Nifti1Image(array, np.diag([*SPACING, 1.0]) if affine is None else affine, dtype=array.dtype)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def slices_by_hand(array: np.ndarray, axis: str) -> np.ndarray:
    """Loops over the RAS array (x right, y anterior, z superior), straight from the words of `unroll`."""
    X, Y, Z = array.shape
    anterior_to_posterior, superior_to_inferior, right_to_left = (
        range(Y - 1, -1, -1),
        range(Z - 1, -1, -1),
        range(X - 1, -1, -1),
    )
    if axis == "axial":
        rows = [[[array[x, y, z] for x in right_to_left] for y in anterior_to_posterior] for z in range(Z)]
    elif axis == "coronal":
        rows = [[[array[x, y, z] for x in right_to_left] for z in superior_to_inferior] for y in range(Y)]
    else:
        rows = [[[array[x, y, z] for y in anterior_to_posterior] for z in superior_to_inferior] for x in range(X)]
    return np.array(rows)


@pytest.mark.parametrize("axis", AXES)
def test_unroll_against_a_hand_loop(axis: str) -> None:
    assert np.array_equal(unroll(ras_array(), axis), slices_by_hand(ras_array(), axis))


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_all_orientations_of_a_file_give_one_sequence(tmp_path: Path, codes: str) -> None:
    ras = nib.Nifti1Image(ras_array(), np.diag([*SPACING, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(codes))
    stored = ras.as_reoriented(turn)
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    nib.save(stored, tmp_path / "a.nii")
    for axis, step, aspect in (("axial", 3.0, 2 / 1.5), ("coronal", 2.0, 3 / 1.5), ("sagittal", 1.5, 3 / 2)):
        with open_volume(tmp_path / "a.nii", data=FULL.model_copy(update={"axis": axis})) as source:
            truth = slices_by_hand(ras_array(), axis) / 119
            np.testing.assert_allclose(source.positions, np.arange(len(truth)) * step)
            assert source.extent == pytest.approx((-step / 2, (len(truth) - 0.5) * step))
            assert source.pixel_aspect == pytest.approx(aspect)
            assert source.details["orientation"] == codes
            chosen = [0, 2, len(truth) - 1]
            np.testing.assert_allclose(source.read(chosen)[:, 0].numpy(), truth[chosen], atol=1e-6)


def test_an_oblique_scan_takes_the_nearest_axes(tmp_path: Path) -> None:
    angle = np.deg2rad(30)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(SPACING)
    with open_volume(save(tmp_path / "a.nii", ras_array(), affine), data=FULL) as source:
        np.testing.assert_allclose(source.positions, np.arange(6) * 3.0, rtol=1e-6)
        assert source.pixel_aspect == pytest.approx(2 / 1.5)
        np.testing.assert_allclose(
            source.read(range(6))[:, 0].numpy(), slices_by_hand(ras_array(), "axial") / 119, atol=1e-6
        )


def test_slope_and_intercept_against_nibabel(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    image = nib.Nifti1Image(ras_array(), np.eye(4))
    image.header.set_slope_inter(-0.5, 40.0)
    nib.save(image, path)
    raw = np.asarray(nib.load(path).dataobj)
    assert raw.min() < -10
    data = DataConfig(intensity="window", window_low=-15.0, window_high=35.0)
    with open_volume(path, data=data) as source:
        truth = np.clip((slices_by_hand(raw, "axial") + 15) / 50, 0, 1)
        np.testing.assert_allclose(source.read(range(6))[:, 0].numpy(), truth, atol=1e-6)
    with open_volume(path, data=DataConfig(percentile_low=10, percentile_high=90)) as source:
        low, high = np.percentile(raw, [10, 90])
        truth = np.clip((slices_by_hand(raw, "axial") - low) / (high - low), 0, 1)
        np.testing.assert_allclose(source.read(range(6))[:, 0].numpy(), truth, atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "u2", "i4", "u4", "i8", "u8", ">f4", "f8", "?", "f2"])
def test_unit_range_of_every_number_type(dtype: str) -> None:
    values = np.arange(120).reshape(4, 5, 6).astype(dtype)
    unit = to_unit_range(values, FULL)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, values.astype(float) / values.astype(float).max(), atol=1e-6)


def test_large_integers_keep_their_differences() -> None:
    values = np.array([2**40, 2**40 + 1, 2**40 + 2]).reshape(3, 1, 1)
    np.testing.assert_allclose(to_unit_range(values, FULL).ravel(), [0, 0.5, 1])


def test_constant_and_mask_like_volumes() -> None:
    assert not to_unit_range(np.full((3, 3, 3), 7), DataConfig()).any()
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[3, 4, 5] = 1
    assert np.array_equal(to_unit_range(mask, DataConfig()), mask.astype(np.float32))


def test_not_finite_voxels_are_the_low_end_and_are_counted(tmp_path: Path) -> None:
    array = ras_array().astype(np.float32)
    array[0, 0, :3] = [np.nan, np.inf, -np.inf]
    with open_volume(save(tmp_path / "a.nii", array), data=FULL) as source:
        clip = source.read(range(6))[:, 0].numpy()
        assert source.details["not_finite"] == 3
    finite = array[np.isfinite(array)]
    truth = (slices_by_hand(array, "axial") - finite.min()) / (finite.max() - finite.min())
    np.testing.assert_allclose(clip, np.where(np.isfinite(truth), truth, 0), atol=1e-6)
    with pytest.raises(SourceError, match="finite"):
        open_volume(save(tmp_path / "b.nii", np.full((3, 3, 3), np.nan, np.float32)), data=FULL)


def test_percentiles_of_a_large_volume_come_from_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(100, 20, (40, 40, 40)).astype(np.float32)
    exact = to_unit_range(values, DataConfig())
    monkeypatch.setattr(volume_module, "MAX_PERCENTILE_VOXELS", 10_000)
    low, high = np.percentile(values[::2, ::2, ::2], [0.5, 99.5])
    sampled = to_unit_range(values, DataConfig())
    np.testing.assert_allclose(sampled, np.clip((values - low) / (high - low), 0, 1), atol=1e-5)
    assert 0 < float(np.abs(sampled - exact).max()) < 0.1


def test_a_fourth_axis_of_one_is_dropped_and_two_axes_are_refused(tmp_path: Path) -> None:
    with open_volume(save(tmp_path / "a.nii", ras_array()[..., None]), data=FULL) as source:
        assert source.read([0, 1]).shape == (2, 1, 5, 4)
    with pytest.raises(SourceError, match="4 x 5;") as caught:
        open_volume(save(tmp_path / "c.nii", ras_array()[..., 0]), data=FULL)
    assert "third axis of length 1" in str(caught.value.hint)


def test_complex_and_color_voxels_are_refused(tmp_path: Path) -> None:
    rgb = np.zeros((3, 3, 3), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    for name, array, said, advice in (
        ("a.nii", ras_array().astype(np.complex64), "complex64", "magnitude"),
        ("b.nii", rgb, r"colors \(RGB\)", "one channel"),
    ):
        with pytest.raises(SourceError, match=f"{said}, not single real numbers") as caught:
            open_volume(save(tmp_path / name, array), data=FULL)
        assert advice in str(caught.value.hint)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_that_claims_more_than_the_file_holds(tmp_path: Path, name: str) -> None:
    save(tmp_path / "whole.nii", ras_array())
    content = bytearray((tmp_path / "whole.nii").read_bytes())
    content[42:48] = np.array([900, 900, 900], "<i2").tobytes()  # dim[1..3]
    (tmp_path / name).write_bytes(gzip.compress(bytes(content)) if name.endswith("gz") else bytes(content))
    with pytest.raises(SourceError, match="claims 1458000000 bytes"):
        open_volume(tmp_path / name, data=FULL)


def test_truncated_files_are_errors(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 30000, (20, 20, 20)).astype(np.int16)
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, noise)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(SourceError):
            open_volume(path, data=FULL)


def test_a_singular_affine_and_an_empty_axis_are_errors(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ras_array())
    content = bytearray(path.read_bytes())
    content[296:312] = bytes(16)  # srow_y
    path.write_bytes(content)
    with pytest.raises(SourceError, match="singular"):
        open_volume(path, data=FULL)
    content = bytearray(save(tmp_path / "b.nii", ras_array()).read_bytes())
    content[44:46] = bytes(2)  # dim[2]
    (tmp_path / "b.nii").write_bytes(content)
    with pytest.raises(SourceError, match="empty axis"):
        open_volume(tmp_path / "b.nii", data=FULL)


def test_bad_indices_and_reading_after_close(tmp_path: Path) -> None:
    source = open_volume(save(tmp_path / "a.nii", ras_array()), data=FULL)
    for indices in ([], [2, 1], [-1], [6]):
        with pytest.raises(ValueError, match="indices"):
            source.read(indices)
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read([0])


def test_every_real_volume_opens_or_says_why_not(shared_data: Path) -> None:
    outcomes = {}
    folders = (shared_data / "volumes", shared_data / "hostile" / "nifti")
    paths = (path for folder in folders for path in folder.rglob("*") if path.suffix != ".dcm")
    for path in sorted(path for path in paths if kind_of_name(path.name) == "volume"):
        name = str(path.relative_to(shared_data))
        try:
            with open_volume(path, data=DataConfig()) as source:
                clip = source.read([0, len(source.positions) - 1] if len(source.positions) > 1 else [0])
                assert 0 <= float(clip.min()) <= float(clip.max()) <= 1
                codes = nib.aff2axcodes(nib.load(path).affine)
                assert source.details["orientation"] == "".join(codes)
                outcomes[name] = "read"
        except SourceError as error:
            outcomes[name] = str(error)
    assert all(outcome == "read" or name in outcome for name, outcome in outcomes.items())
    assert all(outcome != "read" for name, outcome in outcomes.items() if name.startswith("hostile"))
    refused = {name for name, outcome in outcomes.items() if outcome != "read" and name.startswith("volumes")}
    # Exactly those with a fourth axis.
    assert refused == {
        "volumes/dipy/small_101D.nii.gz",
        "volumes/dipy/small_25.nii.gz",
        "volumes/dipy/small_64D.nii",
        "volumes/nibabel/example4d.nii.gz",
        "volumes/nibabel/example_nifti2.nii.gz",
        "volumes/nibabel/functional.nii",
        "volumes/nibabel/test.mgz",
        "volumes/nifti_rs/rgba/4D.nii",
        "volumes/nilearn/test.mgz",
    }
