"""MedMNIST archives as corpora."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from videogru.config import DataConfig
from videogru.data.card import load_card
from videogru.data.layouts import Corpus, open_corpus
from videogru.errors import DataError


def opened(dataset: object, data_dir: Path | None = None) -> Corpus:
    return open_corpus(DataConfig(dataset=str(dataset), data_dir=data_dir))


def bundled_npz() -> Path:
    return load_card("adrenalmnist3d").folder / "adrenalmnist3d.npz"


def test_adrenal_counts_and_order() -> None:
    corpus = opened("adrenalmnist3d")
    assert corpus.arrays is not None
    assert (corpus.kind, corpus.arrays.shape, corpus.arrays.dtype) == ("volume", (1584, 28, 1, 28, 28), np.uint8)
    assert [len(corpus.manifest.rows(split)) for split in ("train", "val", "test")] == [1188, 98, 298]
    row = int(corpus.manifest.rows("test")[17])
    assert corpus.manifest.sources[row] == "adrenalmnist3d.npz/test/17"
    with np.load(bundled_npz()) as arrays:
        assert corpus.manifest.labels[row] == arrays["test_labels"][17, 0]
        assert corpus.arrays[row].sum() == arrays["test_images"][17].sum()


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_adrenal_rows_are_what_the_nifti_reader_gives(tmp_path: Path, axis: str) -> None:
    import nibabel

    from videogru.data.volume import open_volume

    data = DataConfig(dataset="adrenalmnist3d", axis=axis, intensity="window", window_low=0, window_high=255)
    corpus = open_corpus(data)
    assert corpus.arrays is not None
    with np.load(bundled_npz()) as arrays:
        voxels = arrays["test_images"][17]
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "x.nii")
    with open_volume(tmp_path / "x.nii", data=data) as source:
        frames = source.read(range(28)).numpy()
    row = int(corpus.manifest.rows("test")[17])
    np.testing.assert_array_equal(np.rint(frames * 255).astype(np.uint8), corpus.arrays[row])


def npz(path: Path, **changes: object) -> Path:
    arrays: dict[str, object] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
        arrays[f"{split}_labels"] = np.array([[0], [1]], np.uint8)
    arrays |= changes
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_medmnist_by_file_and_by_size(tmp_path: Path) -> None:
    path = npz(tmp_path / "adrenalmnist3d_9.npz")
    for place in (path, tmp_path):
        corpus = opened("adrenalmnist3d", place)
        assert corpus.arrays is not None
        assert corpus.arrays.shape == (6, 5, 1, 4, 3)
    npz(tmp_path / "adrenalmnist3d_8.npz")
    with pytest.raises(DataError, match="several sizes"):
        opened("adrenalmnist3d", tmp_path)
    npz(tmp_path / "adrenalmnist3d.npz")
    with pytest.raises(DataError, match="published are 276833"):
        opened("adrenalmnist3d", tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_labels": None}, "val_labels"),
        ({"train_images": np.zeros((2, 3, 4), np.uint8)}, "train holds images"),
        ({"train_images": np.zeros((2, 3, 4, 5), np.float32)}, "train holds images"),
        ({"train_images": np.zeros((2, 3, 4, 6), np.uint8)}, "differ in shape"),
        ({"test_labels": np.array([[0], [2]])}, r"not all in 0..1"),
        ({"test_labels": np.array([[0]])}, "test holds images"),
        ({"test_labels": np.array([[None], [1]])}, "cannot be read"),
    ],
)
def test_foreign_npz(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = npz(tmp_path / "x.npz", **changes)
    with pytest.raises(DataError, match=words):
        opened("adrenalmnist3d", path)


def test_npz_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz")
    header = io.BytesIO()
    claimed = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 1, 1)}
    np.lib.format.write_array_header_1_0(header, claimed)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, header.getvalue() if name == "train_images.npy" else content)
    with pytest.raises(DataError, match="does not fit"):
        opened("adrenalmnist3d", path)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_npz(tmp_path: Path, keep: float) -> None:
    raw = bundled_npz().read_bytes()
    path = tmp_path / "x.npz"
    path.write_bytes(raw[: int(keep * len(raw)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match="cannot be read as .npz"):
        opened("adrenalmnist3d", path)


def test_npz_with_a_flipped_byte(tmp_path: Path) -> None:
    raw = bytearray(npz(tmp_path / "x.npz").read_bytes())
    raw[90] ^= 0xFF  # inside the first member's deflate stream
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(DataError, match="cannot be read as .npz"):
        opened("adrenalmnist3d", tmp_path / "x.npz")
