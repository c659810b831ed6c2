"""The same anatomy gives the same sequence and the same answer, however it was stored; truth: as_closest_canonical."""

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from videogru.checkpoint.model_file import make_card
from videogru.config import DataConfig, ModelConfig
from videogru.data.readers.volume import volume as volume_module
from videogru.data.readers.volume.volume import chosen_axis, open_volume
from videogru.errors import SourceError
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Classifier

ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for flips in product((0, 1), repeat=3)
]
SPACING = (0.75, 1.25, 2.5)  # mm along patient x, y, z
# degrees about x, y, z
OBLIQUE = {"tilted": (20, 0, 0), "turned": (0, 0, -30), "all": (12, -17, 25), "gantry": (0, 35, 0)}
UNROLLED = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}


def anatomy(dtype: str = "i2") -> np.ndarray:
    """No two voxels alike, nothing symmetric."""
    voxels = np.random.default_rng(3).permutation(9 * 8 * 7).reshape(9, 8, 7)
    return (voxels - 100).astype(dtype) if dtype == "i2" else np.exp(voxels / 100).astype(dtype)


def affine_of(degrees: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    x, y, z = np.deg2rad(degrees)
    turn_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    turn_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    turn_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn_z @ turn_y @ turn_x @ np.diag(SPACING)
    affine[:3, 3] = (-11, 7, 33)
    return affine


def stored(folder: Path, voxels: np.ndarray, affine: np.ndarray, codes: str) -> Path:
    """The same anatomy in the file order `codes`, which nibabel makes with the affine that goes with it."""
    image = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    path = folder / f"{codes}.nii"
    nib.save(image.as_reoriented(turn), path)
    return path


def canonical_slices(path: Path, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """By nibabel: values as slices, rows from the top, columns from the patient's right; spacing along R, A, S."""
    image = nib.as_closest_canonical(nib.load(path))
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    return np.asarray(image.dataobj).transpose(UNROLLED[axis])[:, ::-1, ::-1], spacing


@pytest.mark.parametrize("intensity", ["percentile", "zscore", "window"])
@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_48_orientations_are_one_sequence_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intensity: str, dtype: str
) -> None:
    monkeypatch.setattr(volume_module, "MAX_PERCENTILE_VOXELS", 100)  # several blocks, and a grid of percentiles
    paths = [stored(tmp_path, anatomy(dtype), affine_of(), codes) for codes in ORIENTATIONS]
    assert len({"".join(nib.aff2axcodes(nib.load(path).affine)) for path in paths}) == 48
    for axis in (*UNROLLED, "auto"):
        data = DataConfig(axis=axis, intensity=intensity, window_low=-50, window_high=300)  # type: ignore[arg-type]
        with open_volume(paths[0], data=data) as source:
            first, positions = source.read(range(len(source.positions))), source.positions
            assert float(first.std()) > 0
        for path in paths:
            with open_volume(path, data=data) as source:
                assert torch.equal(source.read(range(len(source.positions))), first), path.name
                assert np.array_equal(source.positions, positions)
                assert source.details["axis"] == ("axial" if axis == "auto" else axis)


@pytest.mark.parametrize("degrees", [(0, 0, 0), *OBLIQUE.values()], ids=["straight", *OBLIQUE])
@pytest.mark.parametrize("axis", UNROLLED)
def test_slices_are_those_of_nibabels_closest_canonical_image(
    tmp_path: Path, axis: str, degrees: tuple[float, float, float]
) -> None:
    data = DataConfig(axis=axis, intensity="window", window_low=-100, window_high=403)  # type: ignore[arg-type]
    for codes in ORIENTATIONS:
        path = stored(tmp_path, anatomy(), affine_of(degrees), codes)
        truth, spacing = canonical_slices(path, axis)
        along, down, across = UNROLLED[axis]
        with open_volume(path, data=data) as source:
            np.testing.assert_allclose(spacing, SPACING, rtol=1e-6)
            np.testing.assert_allclose(np.diff(source.positions), spacing[along], rtol=1e-6)
            assert source.pixel_aspect == pytest.approx(spacing[down] / spacing[across], rel=1e-6)
            said = source.read(range(len(source.positions)))[:, 0].numpy()
        np.testing.assert_allclose(said, (truth + 100) / 503, atol=1e-6)
        assert np.array_equal(truth, anatomy().transpose(UNROLLED[axis])[:, ::-1, ::-1])


def test_all_orientations_get_the_same_prediction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = DataConfig(frame_size=16, num_frames=5, intensity="zscore").for_kind("volume")
    model = Classifier(
        ModelConfig(encoder_width=4, hidden_size=6),
        in_channels=1,
        frame_size=16,
        num_classes=3,
        mean=(0.3,),
        std=(0.1,),
    )
    predictor = Predictor(
        model, make_card(model, kind="volume", classes=("a", "b", "c"), data=data), device="cpu", data=data
    )
    straight = [stored(tmp_path, anatomy(), affine_of(), codes) for codes in ORIENTATIONS]
    (tmp_path / "oblique").mkdir()
    oblique = [stored(tmp_path / "oblique", anatomy(), affine_of((12, -17, 25)), codes) for codes in ORIENTATIONS]
    # Another anatomy, so that the answers could differ.
    other = tmp_path / "other.nii"
    nib.save(nib.Nifti1Image(anatomy()[::-1].copy(), affine_of()), other)
    # Batches of one: the order of sums depends on the size of a batch, and that is not what is asked here.
    said = [predictor.predict_paths([path], num_workers=0).probabilities[0] for path in [*straight, *oblique, other]]
    assert all(np.array_equal(row, said[0]) for row in said[:48])
    np.testing.assert_allclose(said[48:96], np.broadcast_to(said[0], (48, 3)), atol=1e-5)
    assert np.abs(said[96] - said[0]).max() > 1e-4


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((1, 1, 5), "axial"),
        ((1, 5, 1), "coronal"),
        ((5, 1, 1), "sagittal"),
        ((1, 1, 1), "axial"),
        ((1, 1, 0.9995), "axial"),
        ((3, 3, 1), "coronal"),
        ((3, 1, 3), "axial"),
    ],
)
def test_auto_cuts_across_the_thickest_spacing(tmp_path: Path, spacing: tuple[float, ...], axis: str) -> None:
    for codes in ("RAS", "LPS", "PIR", "SAL"):
        path = stored(tmp_path, anatomy(), np.diag([*spacing, 1.0]), codes)
        with open_volume(path, data=DataConfig(axis="auto")) as source:
            assert source.details["axis"] == axis
            assert source.positions[1] == pytest.approx(spacing[UNROLLED[axis][0]])
    assert chosen_axis("auto") == "axial"
    assert chosen_axis("sagittal", [float(side) for side in spacing]) == "sagittal"


@pytest.mark.parametrize("axis", UNROLLED)
def test_one_slice_is_a_sequence_of_one(tmp_path: Path, axis: str) -> None:
    shape = [6, 7, 8]
    shape[UNROLLED[axis][0]] = 1
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    nib.save(nib.Nifti1Image(voxels, np.diag([*SPACING, 1.0])), tmp_path / "a.nii.gz")
    with open_volume(tmp_path / "a.nii.gz", data=DataConfig(axis=axis)) as source:  # type: ignore[arg-type]
        step = SPACING[UNROLLED[axis][0]]
        assert source.positions.tolist() == [0.0]
        assert source.extent == pytest.approx((-step / 2, step / 2))
        assert source.read([0]).shape[:2] == (1, 1)
    data = DataConfig(axis=axis, frame_size=16).for_kind("volume")  # type: ignore[arg-type]
    model = Classifier(
        ModelConfig(encoder_width=4, hidden_size=6),
        in_channels=1,
        frame_size=16,
        num_classes=2,
        mean=(0.3,),
        std=(0.1,),
    )
    predictor = Predictor(model, make_card(model, kind="volume", classes=("a", "b"), data=data), device="cpu")
    said = predictor.predict_paths([tmp_path / "a.nii.gz"], num_workers=0)
    assert said.errors.tolist() == [""]
    assert said.probabilities.sum() == pytest.approx(1, abs=1e-6)


def test_sizes_of_voxels_do_not_make_an_affine_singular(tmp_path: Path) -> None:
    for size in (1e-5, 1e4):
        nib.save(nib.Nifti1Image(anatomy(), np.diag([size, size, size, 1.0])), tmp_path / "a.nii")
        with open_volume(tmp_path / "a.nii", data=DataConfig()) as source:
            assert source.positions[1] == pytest.approx(size, rel=1e-6)
    flat = np.diag([1.0, 1.0, 1.0, 1.0])
    flat[:, 1] = flat[:, 0]
    image = nib.Nifti1Image(anatomy(), np.eye(4))
    image.header["srow_x"], image.header["srow_y"] = [1, 1, 0, 0], [0, 0, 0, 0]
    image.header["sform_code"] = 1
    nib.save(image, tmp_path / "b.nii")
    content = bytearray((tmp_path / "b.nii").read_bytes())
    content[280:328] = flat[:3].astype("<f4").tobytes()  # srow_x, srow_y, srow_z
    (tmp_path / "b.nii").write_bytes(content)
    with pytest.raises(SourceError, match="singular"):
        open_volume(tmp_path / "b.nii", data=DataConfig())


def test_a_skew_grid_is_told_in_degrees(tmp_path: Path) -> None:
    tilt = np.eye(4)
    tilt[1, 2] = np.tan(np.deg2rad(15))  # of a CT gantry: slices stay axial, their centers move along y
    for name, affine, expected in (("tilted", affine_of() @ tilt, None), ("right", affine_of((20, -5, 9)), "")):
        nib.save(nib.Nifti1Image(anatomy(), affine), tmp_path / f"{name}.nii")
        with open_volume(tmp_path / f"{name}.nii", data=DataConfig()) as source:
            said = source.details.get("notes", "")
        if expected is not None:
            assert said == expected
            continue
        y, z = affine[:3, 1], affine[:3, 2]
        off = 90 - np.degrees(np.arccos(y @ z / np.linalg.norm(y) / np.linalg.norm(z)))
        assert off > 5 and f"{abs(off):.1f} degrees off right angles" in said[0]


@pytest.mark.parametrize(("axis", "thin"), [("coronal", 1), ("sagittal", 0), ("axial", 2)])
def test_one_slice_along_another_axis_is_told(tmp_path: Path, axis: str, thin: int) -> None:
    one = anatomy()[tuple(slice(1) if place == thin else slice(None) for place in range(3))]
    nib.save(nib.Nifti1Image(one, affine_of()), tmp_path / "one.nii")
    for asked in ("axial", "coronal", "sagittal"):
        with open_volume(tmp_path / "one.nii", data=DataConfig(axis=asked)) as source:
            said = " ".join(source.details.get("notes", ()))
        assert (f"use data.axis={axis}" in said) is (asked != axis)


def test_oblique_degrees_and_planes_of_a_skew_grid(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(anatomy(), affine_of((20, 0, 0))), tmp_path / "oblique.nii")
    with open_volume(tmp_path / "oblique.nii", data=DataConfig()) as source:
        assert source.details["oblique_degrees"] == 20.0
    tilt = np.eye(4)
    tilt[1, 2] = 2.0  # mm along y for each slice 2 mm higher: 45 degrees
    nib.save(nib.Nifti1Image(anatomy(), tilt @ np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "skew.nii")
    with open_volume(tmp_path / "skew.nii", data=DataConfig()) as source:
        (note,) = source.details["notes"]
    # Slices are 2 mm apart, however far each is moved; centers 2 sqrt(5) mm.
    assert note.endswith("1 x 0.4472 x 2 mm apart along the stored axes")


def test_spacings_that_stand_for_none(tmp_path: Path) -> None:
    for shape, affine, told in (((40, 40, 6), np.eye(4), True), ((9, 8, 7), np.eye(4), False),
                                ((40, 40, 6), np.diag([1, 1, 5, 1]), False)):  # fmt: skip
        nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), affine), tmp_path / "one.nii")
        with open_volume(tmp_path / "one.nii", data=DataConfig()) as source:
            assert any("is that true" in note for note in source.details.get("notes", ())) is told
