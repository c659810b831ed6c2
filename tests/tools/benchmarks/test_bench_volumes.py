"""tools/benchmarks/bench_volumes.py: what it makes, measures and says."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    from tools.benchmarks import bench_volumes

    return bench_volumes


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    # A ramp from left to right, so that resampling has an answer by hand.
    ramp = np.broadcast_to(np.linspace(0, 200, 40).astype(np.uint8)[:, None, None], (40, 36, 40)).copy()
    nib.save(nib.Nifti1Image(ramp, np.diag([-1.0, 1, 1, 1])), tmp_path / "a.nii.gz")
    return tmp_path / "a.nii.gz"


def test_the_made_scan_keeps_the_anatomy_and_its_size(bench, scan: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "SHAPE", (80, 72, 40))
    bench.synthetic(scan, tmp_path / "b.nii.gz")
    made = nib.load(tmp_path / "b.nii.gz")
    assert made.shape == (80, 72, 40)
    assert made.get_data_dtype() == np.int16
    assert np.allclose(nib.affines.voxel_sizes(made.affine) * made.shape, (40, 36, 40))
    profile = np.asarray(made.dataobj).mean(axis=(1, 2))
    assert np.abs(profile[2:] - np.linspace(0, 4080, 80)[2:]).max() < 80


def test_the_cache_gives_the_bits_of_our_reading(bench, scan: Path, tmp_path: Path) -> None:
    read = bench.ours(scan)()
    assert read.shape == (32, 1, 224, 224)
    for first in (False, True):
        assert torch.equal(bench.from_cache(scan, tmp_path / "cache", first=first)(), read)


def test_verdicts(bench) -> None:
    times = {bench.OURS: [10.0, 20.0], bench.CACHED: [1.0, 1.0], bench.FIRST: [0.5, 0.5]}
    times |= {"MONAI": [40.0, 40.0], "TorchIO": [29.0, 58.0]}
    memory = {bench.OURS: 10.0, "MONAI": 20.0, "TorchIO": 19.0}
    found = bench.verdicts(times, {name: {"above_mib": [value, value]} for name, value in memory.items()})
    assert [verdict["reached"] for verdict in found] == [True, False, True, False, False, True]
    assert found[0]["values"] == [4.0, 2.0]


def test_mistakes(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--scan", str(tmp_path / "none.nii.gz"), "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--scan", "a", "--out", "b", "--rounds", "0"])
