"""MedMNIST archives as corpora."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from videogru.config import DataConfig
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.data.manifests.dataset_card import load_card
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

    from videogru.data.readers.volume.volume import open_volume

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


# medmnist/info.py of the publisher's package
PUBLISHED = {
    "adrenalmnist3d": (
        ("normal", "hyperplasia"),
        "bbd3c5a5576322bc4cdfea780653b1ce",
        "17721accfe9fb005146a47d33bc54b2f",
    ),
    "fracturemnist3d": (
        ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"),
        "6aa7b0143a6b42da40027a9dda61302f",
        "f01d7e6316aedf4210da0da5b7437b42",
    ),
    "nodulemnist3d": (("benign", "malignant"), "8755a7e9e05a4d9ce80a24c3e7a256f3", "c47c5b7d457bf6332200d2ea6d64ecd8"),
    "organmnist3d": (
        (
            *("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart"),
            *("lung-right", "lung-left", "spleen", "pancreas"),
        ),
        "a0c5a1ff56af4f155c46d46fbb45a2fe",
        "58a2205adf14a9d0a189cb06dc78bf10",
    ),
    "synapsemnist3d": (
        ("inhibitory synapse", "excitatory synapse"),
        "1235b78a3cd6280881dd7850a78eadb6",
        "43bd14ebf3af9d3dd072446fedc14d5e",
    ),
    "vesselmnist3d": (("vessel", "aneurysm"), "b41fd4f7e7e2feedddb201585ecafa1b", "6bb274a8846e1097066dcd64e2c4520f"),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("side", [28, 64])
def test_every_3d_set_by_the_file_of_a_size(
    tmp_path: Path, name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes, small, large = PUBLISHED[name]
    card = load_card(name)
    assert card.classes == classes
    assert {file: facts.md5 for file, facts in card.files.items()} == {f"{name}.npz": small, f"{name}_64.npz": large}
    labels = np.arange(len(classes), dtype=np.uint8)[:, None]
    images = np.random.default_rng(side).integers(0, 256, (3, len(classes), side, side, side), np.uint8)
    path = tmp_path / f"{name}{'' if side == 28 else '_64'}.npz"
    splits = ("train", "val", "test")
    arrays = {f"{split}_images": images[code] for code, split in enumerate(splits)}
    np.savez(path, **arrays, **{f"{split}_labels": labels for split in splits})
    # Made up, so not what was published.
    with pytest.raises(DataError, match="published"):
        opened(name, path)
    monkeypatch.setattr(type(card), "check_file", lambda self, path: None)
    corpus = opened(name, path)
    assert (corpus.kind, corpus.classes, corpus.missing) == ("volume", classes, 0)
    assert corpus.arrays is not None
    assert corpus.arrays.shape == (3 * len(classes), side, 1, side, side)
    assert corpus.manifest.labels.tolist() == 3 * list(range(len(classes)))
    # z becomes time; rows from anterior, columns from the patient's right: see unroll
    assert np.array_equal(corpus.arrays[-1, 5, 0], images[2, -1, ::-1, ::-1, 5].T)
