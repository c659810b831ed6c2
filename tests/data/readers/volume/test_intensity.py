"""Intensities in 0..1: TorchIO's z-normalization as the truth, holes, constants, and the way through a model file."""

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from videogru.checkpoint.model_file import make_card, read_model, write_model
from videogru.config import DataConfig, ModelConfig
from videogru.data.readers.volume import volume as volume_module
from videogru.data.readers.volume.volume import open_volume, to_unit_range
from videogru.errors import SourceError
from videogru.models.classifier import Classifier

ZSCORE = DataConfig(intensity="zscore")


def head(seed: int = 0) -> np.ndarray:
    """Dark around, bright inside, as an MR scan is."""
    random = np.random.default_rng(seed)
    voxels = random.normal(20, 5, (24, 26, 22))
    voxels[6:18, 6:20, 5:17] = random.normal(600, 90, (12, 14, 12))
    return voxels.clip(0).astype(np.int16)


def by_hand(values: np.ndarray, reach: float) -> np.ndarray:
    finite = values[np.isfinite(values)].astype(np.float64)
    foreground = finite[finite > finite.mean()]
    low, high = (foreground.mean() + sign * reach * foreground.std(ddof=1) for sign in (-1, 1))
    return np.clip((values - low) / (high - low), 0, 1)


@pytest.mark.parametrize("reach", [1.0, 4.0])
def test_zscore_is_torchios_mapped_to_0_to_1(reach: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchio = pytest.importorskip("torchio")
    voxels = head()
    scaled = torchio.ZNormalization(masking_method=torchio.ZNormalization.mean)(
        torchio.ScalarImage(tensor=torch.from_numpy(voxels[None].astype(np.float32)))
    )
    truth = ((scaled.data[0].numpy() + reach) / (2 * reach)).clip(0, 1)
    said = to_unit_range(voxels, DataConfig(intensity="zscore", zscore_range=reach))
    np.testing.assert_allclose(said, truth, atol=2e-5)


@pytest.mark.parametrize("blocks", [50, 3000, 10**9])
def test_zscore_against_numpy_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    monkeypatch.setattr(volume_module, "MAX_PERCENTILE_VOXELS", blocks)
    for values in (head(), head().astype(np.float32) + 30_000, head()[:, None] - 500):
        np.testing.assert_allclose(to_unit_range(values, ZSCORE), by_hand(values, 4.0), atol=1e-5)


@pytest.mark.parametrize("slope", [2.5, -0.5])
def test_zscore_of_a_scaled_file(tmp_path: Path, slope: float) -> None:
    """The foreground is that of the values, which a negative slope turns around."""
    path = tmp_path / "a.nii.gz"
    image = nib.Nifti1Image(head(), np.eye(4))
    image.header.set_slope_inter(slope, 40.0)
    nib.save(image, path)
    values = np.asarray(nib.load(path).dataobj)
    assert values[12, 12, 12] == pytest.approx(head()[12, 12, 12] * slope + 40)
    truth = by_hand(values, 4.0).transpose(2, 1, 0)[:, ::-1, ::-1]
    with open_volume(path, data=ZSCORE) as source:
        said = source.read(range(len(source.positions)))[:, 0].numpy()
    np.testing.assert_allclose(said, truth, atol=1e-6)


@pytest.mark.parametrize("intensity", ["percentile", "zscore"])
def test_holes_constants_and_masks(tmp_path: Path, intensity: str) -> None:
    data = DataConfig(intensity=intensity)  # type: ignore[arg-type]
    for constant in (np.full((4, 4, 4), 7, np.uint8), np.full((4, 4, 4), -2.5, np.float32), np.zeros((1, 1, 1))):
        assert not to_unit_range(constant, data).any()
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[3:6, 4:6, 5] = 1
    assert np.array_equal(to_unit_range(mask, data), mask.astype(np.float32))
    holed = head().astype(np.float32)
    holed[0, 0, :3] = np.nan, np.inf, -np.inf
    nib.save(nib.Nifti1Image(holed, np.eye(4)), tmp_path / "a.nii.gz")
    with open_volume(tmp_path / "a.nii.gz", data=data) as source:
        said = source.read(range(len(source.positions)))[:, 0].numpy()
        assert source.details["not_finite"] == 3
    where = (~np.isfinite(holed)).transpose(2, 1, 0)[:, ::-1, ::-1]
    assert not said[where].any() and np.isfinite(said).all() and said.max() > 0.5
    with pytest.raises(ValueError, match="finite"):
        to_unit_range(np.full((3, 3, 3), np.nan, np.float32), data)


def test_percentiles_where_the_grid_meets_holes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every voxel of the coarse grid is NaN: the finite ones between are found, and not all of them are copied."""
    monkeypatch.setattr(volume_module, "MAX_PERCENTILE_VOXELS", 1000)
    values = np.random.default_rng(0).normal(100, 20, (20, 20, 20))
    values[::2, ::2, ::2] = np.nan
    assert len(volume_module._some_finite(values)) < 1100
    low, high = np.nanpercentile(values, [0.5, 99.5])
    truth = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1))
    assert np.abs(to_unit_range(values, DataConfig()) - truth).max() < 0.1


@pytest.mark.parametrize("intensity", ["percentile", "zscore"])
def test_intensities_beyond_numbers_are_an_error_of_the_file(tmp_path: Path, intensity: str) -> None:
    voxels = np.full((4, 4, 4), 1.7e308)
    voxels[::2] = -1.7e308
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(SourceError, match="more than a number can hold|too large"):
        open_volume(tmp_path / "a.nii", data=DataConfig(intensity=intensity))  # type: ignore[arg-type]


def test_squares_beyond_numbers_are_an_error_too() -> None:
    with pytest.raises(ValueError, match="too large"):
        to_unit_range(head() * 1e160, ZSCORE)


def test_a_window_is_fixed_whatever_the_scan_holds(tmp_path: Path) -> None:
    """Brain window of CT: center 40 HU, width 80."""
    data = DataConfig(intensity="window", window_low=0, window_high=80)
    for value, said in ((-1000, 0.0), (20, 0.25), (40, 0.5), (80, 1.0), (700, 1.0)):
        nib.save(nib.Nifti1Image(np.full((3, 3, 3), value, np.int16), np.eye(4)), tmp_path / "a.nii")
        with open_volume(tmp_path / "a.nii", data=data) as source:
            assert source.read([1]).unique().tolist() == pytest.approx([said])


def test_how_scans_are_read_travels_in_the_model_file(tmp_path: Path) -> None:
    data = DataConfig(
        frame_size=16,
        axis="auto",
        volume="mean",
        intensity="zscore",
        zscore_range=2.5,
        percentile_low=1,
        percentile_high=98,
        window_low=-1000,
        window_high=400,
        max_memory_gib=1.5,
    ).for_kind("volume")
    model = Classifier(
        ModelConfig(encoder_width=4, hidden_size=6),
        in_channels=1,
        frame_size=16,
        num_classes=2,
        mean=(0.3,),
        std=(0.1,),
    )
    write_model(tmp_path / "m.safetensors", model, make_card(model, kind="volume", classes=("a", "b"), data=data))
    assert read_model(tmp_path / "m.safetensors")[1].data == data
    for volume in (None, 0, 12):
        changed = data.model_copy(update={"volume": volume})
        assert DataConfig.model_validate_json(changed.model_dump_json()) == changed
