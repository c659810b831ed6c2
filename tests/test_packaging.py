"""A wheel, installed away from the checkout, must find its cards, recipes and templates."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The wheel's content in a folder of its own (its dependencies come from this interpreter)."""
    wheels, place = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    # Without isolation: the build back end is among the development packages, and nothing is downloaded.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(repository)],
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(place)
    assert "videogru/datasets/adrenalmnist3d/adrenalmnist3d.npz" in names
    assert "videogru/configs/adrenalmnist3d.yaml" in names
    assert "videogru/inference/report/report.html.jinja" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "datasets/", "configs/"))]
    return place


def videogru(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    script = (
        "import videogru, sys; assert videogru.__file__.startswith(sys.argv.pop(1)), videogru.__file__; "
        "from videogru.cli.main import main; main()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(installed), *arguments],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_lists_its_cards(installed: Path, tmp_path: Path) -> None:
    listed = videogru(installed, tmp_path, "data", "list")
    for name in ("adrenalmnist3d", "cifar100", "grid_digits", "kinetics400"):
        assert name in listed


@pytest.mark.slow
def test_trains_on_a_bundled_set(installed: Path, tmp_path: Path) -> None:
    videogru(
        installed,
        tmp_path,
        *("train", "--dataset", "adrenalmnist3d", "--epochs", "1", "--out", "run"),
        *("--set", "model.encoder_width=8", "--set", "train.batch_size=128", "--set", "data.num_frames=8"),
    )
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
