"""DICOM series: against NIfTI files of the same voxels, against SimpleITK, and what is refused in which words."""

import sys
import time
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.support.dicom_series import (
    REPORT,
    changed,
    enhanced,
    place_of,
    plain,
    pydicom,
    slices_of,
    with_pixels,
    write,
)
from tests.support.thinning import thinned
from videogru.config import DataConfig
from videogru.data.readers.dicom_files import holds_dicom
from videogru.data.readers.open import open_source
from videogru.data.readers.volume.dicom import read_dicom
from videogru.data.readers.volume.volume import open_volume
from videogru.errors import SourceError

FULL = DataConfig(percentile_low=0, percentile_high=100)
SPACING = (1.5, 2.0, 3.0)
ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for flips in product((0, 1), repeat=3)
]
STRAIGHT = np.array([[-1.5, 0, 0, 10], [0, -2.0, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])


def voxels(kind: type = np.int16) -> np.ndarray:
    """4 x 5 x 6 voxels, each with a number of its own."""
    return np.random.default_rng(0).permutation(120).reshape(4, 5, 6).astype(kind)


def same_as_nifti(folder: Path, array: np.ndarray, affine: np.ndarray, **data: object) -> None:
    """Slices, places and spacing are what the NIfTI reader makes of the same voxels."""
    nii = folder.parent / "truth.nii"
    nib.save(nib.Nifti1Image(array, affine, dtype=array.dtype), nii)
    for axis in ("axial", "coronal", "sagittal"):
        settings = FULL.model_copy(update={"axis": axis, **data})
        with open_source(folder, data=settings, kind="volume") as found, open_volume(nii, data=settings) as truth:
            assert found.kind == "volume"
            every = range(len(truth.positions))
            np.testing.assert_allclose(found.read(every).numpy(), truth.read(every).numpy(), atol=1e-6)
            np.testing.assert_allclose(found.positions, truth.positions, atol=1e-5)
            assert found.pixel_aspect == pytest.approx(truth.pixel_aspect, abs=1e-5)
            assert found.extent == pytest.approx(truth.extent, abs=1e-5)


@pytest.mark.parametrize("codes", thinned(ORIENTATIONS, every=5))
def test_all_orientations_with_shuffled_names_are_what_a_nifti_gives(tmp_path: Path, codes: str) -> None:
    ras = nib.Nifti1Image(voxels(), np.array([[1.5, 0, 0, -7], [0, 2, 0, 5], [0, 0, 3, 11], [0, 0, 0, 1.0]]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(codes))
    stored = ras.as_reoriented(turn)
    array = np.asarray(stored.dataobj)
    folder = write(tmp_path / "series", slices_of(array, stored.affine), seed=len(codes) + ord(codes[0]))
    same_as_nifti(folder, array, stored.affine)
    scan = read_dicom(folder, data=FULL)
    # Every voxel lies where the NIfTI file has it, whichever way the slices were counted.
    for index in np.ndindex(*scan.voxels.shape):
        place = (np.linalg.inv(stored.affine) @ (scan.affine @ [*index, 1])).round(4)
        assert array[tuple(place[:3].astype(int))] == scan.voxels[index]


def test_an_oblique_series(tmp_path: Path) -> None:
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(SPACING)
    affine[:3, 3] = -20, 30, 7
    folder = write(tmp_path / "series", slices_of(voxels(), affine))
    same_as_nifti(folder, voxels(), affine)
    np.testing.assert_allclose(read_dicom(folder, data=FULL).affine, affine, atol=1e-6)


def test_a_tilted_gantry_goes_into_the_affine(tmp_path: Path) -> None:
    affine = STRAIGHT.copy()
    affine[1, 2] = 1.0
    scan = read_dicom(write(tmp_path / "s", slices_of(voxels(), affine)), data=FULL)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-6)
    assert scan.details["gantry_tilt_degrees"] == pytest.approx(np.degrees(np.arctan(1 / 3)), abs=1e-3)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32])
def test_kinds_of_pixels_stay(tmp_path: Path, kind: type) -> None:
    scan = read_dicom(write(tmp_path / "s", slices_of(voxels(kind), STRAIGHT)), data=FULL)
    assert scan.voxels.dtype == kind
    assert np.array_equal(scan.voxels, voxels(kind))


def test_one_slope_for_all_stays_a_slope(tmp_path: Path) -> None:
    objects = slices_of(voxels(), STRAIGHT, RescaleSlope=2.0, RescaleIntercept=-1024.0)
    scan = read_dicom(write(tmp_path / "s", objects), data=FULL)
    assert (scan.slope, scan.intercept, scan.voxels.dtype) == (2.0, -1024.0, np.int16)


def test_a_slope_for_each_slice_is_applied(tmp_path: Path) -> None:
    objects = slices_of(voxels(), STRAIGHT)
    for step, one in enumerate(objects):
        changed(one, RescaleSlope=0.5 + step, RescaleIntercept=-10.0 * step)
    del objects[0].RescaleSlope, objects[0].RescaleIntercept  # absent: 1 and 0
    scan = read_dicom(write(tmp_path / "s", objects), data=FULL)
    slopes, intercepts = np.array([1, 1.5, 2.5, 3.5, 4.5, 5.5]), np.array([0, -10, -20, -30, -40, -50])
    assert (scan.slope, scan.intercept, scan.voxels.dtype) == (1.0, 0.0, np.float32)
    np.testing.assert_array_equal(scan.voxels, (voxels() * slopes + intercepts).astype(np.float32))


def test_files_without_suffix_are_known_by_their_mark(tmp_path: Path) -> None:
    names = ["IM0001", "IM0002", "1.2.840.9", "1.2.840.10", "x", "y.dcm"]
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT), names=names)
    (folder / "LICENSE").write_text("free")
    (folder / "notes.txt").write_text("none")
    (folder / ".hidden.dcm").write_text("none")
    same_as_nifti(folder, voxels(), STRAIGHT)
    assert read_dicom(folder, data=FULL).details["other_files"] == 2


def test_reports_and_directories_are_counted(tmp_path: Path) -> None:
    report = plain(REPORT, series="9.9")
    index = plain("1.2.840.10008.1.3.10", SOPClassUID=None, SeriesInstanceUID=None)
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    index.save_as(folder / "DICOMDIR", enforce_file_format=True)
    found = read_dicom(folder, data=FULL).details["objects_without_image"]
    assert found == {"Basic Text SR Storage": 1, "Media Storage Directory Storage": 1}
    same_as_nifti(folder, voxels(), STRAIGHT)
    with pytest.raises(SourceError, match="holds no image but 1 Basic Text SR Storage"):
        open_source(folder / "report.dcm", data=FULL)


def test_one_file_of_a_series_is_one_slice(tmp_path: Path) -> None:
    objects = slices_of(voxels(), STRAIGHT, SliceThickness="4")
    folder = write(tmp_path / "s", objects)
    with open_source(folder / "0000.dcm", data=FULL) as source:
        assert len(source.positions) == 1
        assert source.extent == (-2.0, 2.0)
        assert source.details["slice_distance_from"] == "SliceThickness"
        assert "name its folder" in str(source.details["note"])
    with pytest.raises(SourceError, match="is DICOM, a volume, expected video"):
        open_source(folder / "0000.dcm", data=FULL, kind="video")
    with pytest.raises(SourceError, match="is DICOM, a volume, expected image"):
        open_source(folder, data=FULL, kind="image")


@pytest.mark.parametrize("shared", [True, False])
def test_enhanced_multi_frame(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "s").mkdir()
    one = enhanced(voxels(), STRAIGHT, [3, 0, 5, 1, 4, 2], shared=shared)
    one.save_as(tmp_path / "s" / "all.dcm", enforce_file_format=True)
    same_as_nifti(tmp_path / "s", voxels(), STRAIGHT)
    same_as_nifti(tmp_path / "s" / "all.dcm", voxels(), STRAIGHT)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"PerFrameFunctionalGroupsSequence": None}, "6 frames but no PerFrameFunctionalGroupsSequence"),
        ({"NumberOfFrames": 5}, "5 frames but places for 6"),
        ({"SharedFunctionalGroupsSequence": None}, "misses PixelSpacing"),
    ],
)
def test_multi_frame_without_places(tmp_path: Path, tags: dict[str, object], words: str) -> None:
    one = enhanced(voxels(), STRAIGHT, list(range(6)), **tags)
    one.save_as(tmp_path / "all.dcm", enforce_file_format=True)
    with pytest.raises(SourceError, match=words):
        open_source(tmp_path / "all.dcm", data=FULL)


# Series ---------------------------------------------------------------------------------------------------------


def two_series(folder: Path) -> Path:
    write(folder, slices_of(voxels(), STRAIGHT), names=[f"a{i}.dcm" for i in range(6)])
    other = slices_of(voxels()[:, :, :4] + 500, STRAIGHT)
    other = [changed(one, SeriesInstanceUID="1.2.4", SeriesNumber=7, SeriesDescription="late") for one in other]
    return write(folder, other, names=[f"b{i}.dcm" for i in range(4)])


def test_several_series_are_listed_and_chosen(tmp_path: Path) -> None:
    folder = two_series(tmp_path / "s")
    with pytest.raises(SourceError) as caught:
        open_source(folder, data=FULL)
    said = str(caught.value)
    assert "holds 2 series: 3: made, 6 files (1.2.3); 7: late, 4 files (1.2.4)" in said
    assert "--series NUMBER" in said
    for wanted, count in (("3", 6), ("1.2.3", 6), ("7", 4), ("1.2.4", 4)):
        scan = read_dicom(folder, data=FULL.model_copy(update={"series": wanted}))
        assert scan.voxels.shape[2] == count
        assert (scan.voxels.max() >= 500) == (count == 4)
    with pytest.raises(SourceError, match=r"holds no series 8, but: 3: made, 6 files"):
        open_source(folder, data=FULL.model_copy(update={"series": "8"}))


def test_series_of_one_number_need_their_uid(tmp_path: Path) -> None:
    folder = two_series(tmp_path / "s")
    for file in folder.glob("b*"):
        changed(pydicom.dcmread(file), SeriesNumber=3).save_as(file)
    with pytest.raises(SourceError, match="holds 2 series of number 3"):
        read_dicom(folder, data=FULL.model_copy(update={"series": "3"}))
    assert read_dicom(folder, data=FULL.model_copy(update={"series": "1.2.4"})).voxels.shape[2] == 4


# What is refused ------------------------------------------------------------------------------------------------


def moved(objects: list, step: int, by: float, axis: int = 2) -> list:
    place = [float(value) for value in objects[step].ImagePositionPatient]
    place[axis] += by
    objects[step].ImagePositionPatient = place
    return objects


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found[:3] + found[4:], r"5 slices are 3.000 mm apart, but 6.000 mm between .* \(1 missing\)"),
        (lambda found: found[:1] + found[3:], r"9.000 mm between \S+ and \S+ \(2 missing\)"),
        (lambda found: moved(found, 3, 0.5), r"3.500 mm between \S+ and \S+; 2.500 mm between"),
        (lambda found: moved(found, 3, -3.0), "lie at the same place"),
        (lambda found: moved(found, 3, 1.0, axis=0), "1.000 mm off the line"),
        (lambda found: [*found, *slices_of(voxels(), STRAIGHT)[:1]], "lie at the same place"),
        (
            lambda found: [*found[:5], changed(found[5], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])],
            r"differ in orientation: 5 with 1\\0\\0\\0\\1\\0, 1 with 0\\1\\0\\0\\0\\-1; the first is",
        ),
        (lambda found: [*found[:5], changed(found[5], PixelSpacing=[2, 1.6])], "differ in pixel spacing"),
        (
            lambda found: [*found[:5], with_pixels(found[5], np.zeros((7, 4), np.int16))],
            "differ in size: 5 of 4x5, 1 of 4x7",
        ),
        *(
            (lambda found, tag=tag: [*found[:5], changed(found[5], **{tag: None})], f"misses {tag}")
            for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "SeriesInstanceUID")
        ),
        (lambda found: [*found[:5], changed(found[5], BitsAllocated=None)], "misses BitsAllocated"),
        (
            lambda found: [changed(one, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]) for one in found],
            "holds no two directions at right angles",
        ),
        (lambda found: [*found[:5], changed(found[5], PixelSpacing=[0, 1.5])], "PixelSpacing is .* not above 0"),
        (lambda found: [changed(one, RescaleSlope=0) for one in found], "RescaleSlope is 0"),
        (lambda found: [changed(one, PhotometricInterpretation="RGB", SamplesPerPixel=3) for one in found], "not gray"),
        (lambda found: [changed(one, PhotometricInterpretation="PALETTE COLOR") for one in found], "not gray"),
        (lambda found: [*found[:5], changed(found[5], PixelData=None)], "pixels cannot be decoded"),
        (lambda found: [*found[:5], changed(found[5], PixelData=bytes(8))], "pixels cannot be decoded"),
        (lambda found: [changed(one, Rows=60000, Columns=60000) for one in found], "claims 7200000000 bytes"),
        (lambda found: [changed(one, BitsAllocated=12) for one in found], "pixels of 12 bits"),
    ],
)
def test_series_that_are_refused(tmp_path: Path, change: Callable[[list], list], words: str) -> None:
    folder = write(tmp_path / "s", change(slices_of(voxels(), STRAIGHT)))
    with pytest.raises(SourceError, match=words) as caught:
        open_source(folder, data=FULL)
    assert caught.value.hint and str(tmp_path) in str(caught.value.where)


def test_slightly_uneven_slices_are_accepted_and_told(tmp_path: Path) -> None:
    scan = read_dicom(write(tmp_path / "s", moved(slices_of(voxels(), STRAIGHT), 3, 0.1)), data=FULL)
    assert scan.details["largest_offset_mm"] == pytest.approx(0.1, abs=1e-6)
    np.testing.assert_allclose(scan.affine, STRAIGHT, atol=1e-6)
    with pytest.raises(SourceError, match="mm apart"):
        read_dicom(write(tmp_path / "t", moved(slices_of(voxels(), STRAIGHT), 3, 0.2)), data=FULL)


def test_more_than_the_memory_that_is_allowed(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))
    columns, rows, slices = voxels().shape
    clip = 4 * voxels().size // min(columns, rows, slices) * min(FULL.num_frames, columns, rows, slices)
    limit = (voxels().nbytes + clip) / 2**30
    read_dicom(folder, data=FULL.model_copy(update={"max_memory_gib": limit}))
    with pytest.raises(SourceError, match="the limit is"):
        read_dicom(folder, data=FULL.model_copy(update={"max_memory_gib": limit * 0.99}))


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        ("1.2.840.10008.1.2.4.80", "compressed by JPEG-LS Lossless.*no decoder is installed"),
        ("1.2.840.10008.1.2.4.100", "compressed by MPEG2.*no decoder is installed"),
        ("1.2.840.10008.1.2.4.90", "pixels cannot be decoded"),
        ("1.2.840.99999.1", "unknown transfer syntax"),
    ],
)
def test_compressed_pixels(tmp_path: Path, syntax: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import Decoder

    if "no decoder" in words:
        monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    objects = slices_of(voxels(), STRAIGHT)
    for one in objects:
        one.PixelData = encapsulate([b"\xff\x4f\xff\x51no such thing"])
        one["PixelData"].VR = "OB"
        one["PixelData"].is_undefined_length = True
        one.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    folder = tmp_path / "s"
    folder.mkdir()
    for number, one in enumerate(objects):
        pydicom.dcmwrite(folder / f"{number}.dcm", one, implicit_vr=False, little_endian=True, enforce_file_format=True)
    with pytest.raises(SourceError, match=words) as caught:
        open_source(folder, data=FULL)
    assert caught.value.hint


def test_run_length_encoded_pixels_are_read(tmp_path: Path) -> None:
    objects = slices_of(voxels(np.uint16), STRAIGHT)
    for one in objects:
        one.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    same_as_nifti(write(tmp_path / "s", objects), voxels(np.uint16), STRAIGHT)


def test_without_pydicom_the_line_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(SourceError, match="needs pydicom") as caught:
        open_source(folder, data=FULL)
    assert caught.value.hint == "pip install 'videogru[dicom]'"


# Real and hostile files -----------------------------------------------------------------------------------------


def test_a_real_series_is_what_simpleitk_reads(shared_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    folder = shared_data / "volumes" / "dicom_t1post"
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    scan = read_dicom(folder, data=FULL)
    assert np.array_equal(scan.voxels, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    to_ras = np.diag([-1.0, -1.0, 1.0])
    turned = to_ras @ np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    np.testing.assert_allclose(scan.affine[:3, :3], turned, atol=1e-4)
    np.testing.assert_allclose(scan.affine[:3, 3], to_ras @ image.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(scan.affine[:3, :3], axis=0), image.GetSpacing(), atol=1e-5)


def test_a_real_hostile_file_is_read_or_refused(shared_data: Path) -> None:
    refused: list[SourceError] = []
    for path in sorted((shared_data / "hostile" / "dicom").iterdir()):
        try:
            with open_source(path, data=FULL) as source:
                assert np.isfinite(source.read([0]).numpy()).all()
        except SourceError as error:
            refused.append(error)
    assert all(error.hint for error in refused)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"x" * 200, bytes(128) + b"DICM", bytes(128) + b"DICM" + b"\xff" * 99]
)
def test_files_that_only_claim_to_be_dicom(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))
    (folder / "x.dcm").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_source(folder / "x.dcm", data=FULL)
    assert caught.value.hint
    if len(content) <= 200 and content[128:132] != b"DICM":
        with pytest.raises(SourceError, match=r"x.dcm: (is no DICOM file|is empty)"):
            open_source(folder, data=FULL)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))

    def refuse(*args: object, **others: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pydicom, "dcmread", refuse)
    with pytest.raises(SourceError, match="0000.dcm: .*Permission denied"):
        open_source(folder, data=FULL)


def test_every_length_of_a_cut_file_is_refused_or_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))
    whole = (folder / "0000.dcm").read_bytes()
    for length in range(1, len(whole), 7):
        (folder / "0000.dcm").write_bytes(whole[:length])
        with pytest.raises(SourceError):
            open_source(folder, data=FULL)


def test_300_mutations_of_a_slice_end_in_a_volume_or_an_error(tmp_path: Path) -> None:
    whole = np.frombuffer(
        (write(tmp_path / "s", slices_of(voxels(), STRAIGHT)[:1]) / "0000.dcm").read_bytes(), np.uint8
    )
    header = len(whole) - 40
    draws = np.random.default_rng(1)
    path = tmp_path / "x.dcm"
    read = 0
    for _ in range(300):
        mutated = whole.copy()
        places = draws.integers(132, header, draws.integers(1, 6))
        mutated[places] = draws.integers(0, 256, len(places))
        path.write_bytes(mutated.tobytes())
        start = time.perf_counter()
        try:
            with open_source(path, data=FULL) as source:
                assert np.isfinite(source.read([0]).numpy()).all()
                read += 1
        except SourceError:
            pass
        assert time.perf_counter() - start < 5
    assert 0 < read < 300


def test_place_of_counts_in_lps() -> None:
    place = place_of(STRAIGHT, 2)
    assert place["ImagePositionPatient"] == [-10, -20, -24]
    assert place["ImageOrientationPatient"] == [1, 0, 0, 0, 1, 0]
    assert place["PixelSpacing"] == [2.0, 1.5]


def test_a_series_is_one_volume(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))
    whole = read_dicom(folder, data=FULL).voxels
    for volume in (0, "mean"):
        assert np.array_equal(read_dicom(folder, data=FULL.model_copy(update={"volume": volume})).voxels, whole)
    with pytest.raises(SourceError, match="a series is one volume: there is no volume 3"):
        read_dicom(folder, data=FULL.model_copy(update={"volume": 3}))


def test_a_link_to_itself_hides_no_series(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", slices_of(voxels(), STRAIGHT))
    (folder / "again").symlink_to("again")
    assert holds_dicom(folder)
    with open_source(folder, data=FULL) as source:
        assert source.kind == "volume"
