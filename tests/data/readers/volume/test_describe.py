"""`data info` of one file: numbers against NumPy's, pictures against the anatomy that was put in."""

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.support.command_line import write_video
from videogru.cli import main as cli
from videogru.config import DataConfig
from videogru.data.readers.volume.describe import describe_scan, ras_voxels
from videogru.data.readers.volume.volume import open_volume
from videogru.data_check.scan_sheet import write_scan_sheet
from videogru.errors import ConfigError, DataError, SourceError
from videogru.workflows import check_data as checks

AXIAL = DataConfig(axis="axial").for_kind("volume")
SHAPE, SPACING = (20, 24, 10), (2.0, 1.5, 4.0)  # right, anterior, superior
# A bright corner block of the patient: right, anterior, superior.
RIGHT_ANTERIOR_SUPERIOR = np.zeros(SHAPE, np.int16)
RIGHT_ANTERIOR_SUPERIOR[10:, 12:, 5:] = 1000
ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for flips in product((0, 1), repeat=3)
]


def save(path: Path, array: np.ndarray, codes: str = "RAS") -> Path:
    image = nib.Nifti1Image(array, np.diag([*SPACING, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(turn), path)
    return path


def width_of(path: str) -> int:
    with Image.open(path) as image:
        return image.width


def block_of(picture: np.ndarray, left: int) -> tuple[float, float, int, int]:
    """Center (x, y) of the bright pixels of a plane relative to the middle of its cell, and their width and height."""
    cell = picture[52:384, left : left + 332, :].copy()
    gray = (cell.min(axis=2) > 200) & (cell.max(axis=2) - cell.min(axis=2) < 10)
    y, x = np.nonzero(gray)
    return x.mean() - 166, y.mean() - 166, int(np.ptp(x)) + 1, int(np.ptp(y)) + 1


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_picture_is_upright_and_in_mm_whatever_is_stored(tmp_path: Path, codes: str) -> None:
    with open_volume(save(tmp_path / "a.nii", RIGHT_ANTERIOR_SUPERIOR, codes), data=AXIAL) as source:
        assert np.array_equal(ras_voxels(source), RIGHT_ANTERIOR_SUPERIOR)
        write_scan_sheet(tmp_path / "a.png", source, axis="axial")
    with Image.open(tmp_path / "a.png") as image:
        picture = np.asarray(image)
    # 40 x 36 x 40 mm: 7.5 pixels for a mm; half of it is bright.
    for place, (right, up, width, height) in enumerate(
        [(-1, -1, 20, 18), (-1, -1, 20, 20), (-1, -1, 18, 20)]  # at the left: right, right, anterior
    ):
        x, y, wide, tall = block_of(picture, 16 + place * 348)
        assert (np.sign(x), np.sign(y)) == (right, up), (codes, place)
        assert wide == pytest.approx(width * 7.5, abs=10)
        assert tall == pytest.approx(height * 7.5, abs=20)  # thick slices are blended at their edges


def test_facts_are_those_of_numpy(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(100, 40, SHAPE).astype(np.float32)
    values[0, 0, :2] = np.nan, np.inf
    data = DataConfig(axis="auto").for_kind("volume")
    with open_volume(save(tmp_path / "a.nii.gz", values, "LPS"), data=AXIAL) as source:
        facts = describe_scan(source, data=data)
    finite = values[np.isfinite(values)].astype(float)
    found = facts["values"]
    assert isinstance(found, dict)
    assert found["min"] == finite.min()
    assert found["max"] == finite.max()
    assert found["mean"] == pytest.approx(finite.mean())
    for rank in (1, 5, 50, 95, 99):
        assert found[f"p{rank}"] == pytest.approx(np.percentile(finite, rank))
    assert list(found) == ["min", "max", "mean", "p1", "p5", "p50", "p95", "p99"]
    assert (facts["orientation"], facts["not_finite"], facts["spacing_mm"]) == ("LPS", 2, "2 x 1.5 x 4")
    model = facts["model"]
    assert isinstance(model, dict)
    assert (model["axis"], model["slices"], model["step_mm"], model["length_mm"]) == (
        "axial (the thickest)",
        10,
        4.0,
        40.0,
    )
    assert model["black_to_white"] == pytest.approx(np.percentile(finite, [0.5, 99.5]).tolist())


@pytest.mark.parametrize(("axis", "slices", "step"), [("axial", 10, 4.0), ("coronal", 24, 1.5), ("sagittal", 20, 2.0)])
def test_what_a_model_would_see(tmp_path: Path, axis: str, slices: int, step: float) -> None:
    path = save(tmp_path / "a.nii", RIGHT_ANTERIOR_SUPERIOR, "PIR")
    facts, sheet = checks.source_info(path, [f"data.axis={axis}"], tmp_path / "a.png")
    assert facts["model"]["axis"] == axis
    assert (facts["model"]["slices"], facts["model"]["step_mm"]) == (slices, step)
    with open_volume(path, data=DataConfig(axis=axis)) as source:
        assert len(source.positions) == slices
        assert np.diff(source.positions).mean() == pytest.approx(step)
    assert sheet == tmp_path / "a.png"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.nii.gz", RIGHT_ANTERIOR_SUPERIOR, "LAS")
    write_video(tmp_path / "v.mp4", bright=True, seed=0, frames=12)
    Image.new("RGB", (8, 6)).save(tmp_path / "i.png")

    def typed(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["videogru", "data", "info", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    code, out, _ = typed("a.nii.gz")
    assert code == 0
    assert "LAS" in out
    assert "picture: scan-info/a.nii.gz.png" in out
    assert width_of("scan-info/a.nii.gz.png") == 1060
    code, out, _ = typed("v.mp4", "--out", "v.png")
    assert code == 0
    assert "frames per second" in out
    assert width_of("v.png") > 1000
    code, out, _ = typed("i.png")
    assert code == 0
    assert "picture" not in out
    assert typed("i.png", "--out", "x.png")[0] == 2
    assert typed("a.nii.gz", "--data-dir", ".")[0] == 2
    assert typed(".", "--out", "x.png")[0] == 2
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:-9])
    code, _, err = typed("b.nii.gz")
    assert code == 3
    assert "b.nii.gz" in err
    assert not (tmp_path / "scan-info" / "b.nii.gz.png").exists()


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    link = tmp_path / "again.nii"
    link.symlink_to("again.nii")
    with pytest.raises(SourceError, match="no such file"):
        checks.source_info(link, [], None)


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        checks.source_info(save(tmp_path / "a.nii", RIGHT_ANTERIOR_SUPERIOR), [], tmp_path / "file" / "a.png")
    with pytest.raises((ConfigError, SourceError)):
        checks.source_info(tmp_path / "a.nii", ["data.volume=3"], None)
