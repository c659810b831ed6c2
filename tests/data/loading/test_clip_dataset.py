from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.data.readers.video.test_video import make_video
from videogru.config import DataConfig
from videogru.data.loading import clip_dataset as dataset_module
from videogru.data.loading.batching import EpochBatches, OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset, clip_lengths
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.manifests.corpus import Corpus
from videogru.data.manifests.manifest import build_manifest
from videogru.data.readers.array_source import ArraySource
from videogru.data.readers.open import open_source


def corpus(kind: str, arrays: np.ndarray) -> Corpus:
    count = len(arrays)
    manifest = build_manifest(Path(), ("a", "b"), [f"x/{row}" for row in range(count)], np.arange(count) % 2)
    return Corpus("x", kind, ("a", "b"), manifest, arrays, None, 0, ())  # type: ignore[arg-type]


@pytest.fixture
def stills() -> Corpus:
    return corpus("image", np.random.default_rng(0).integers(0, 256, (9, 1, 3, 8, 8), dtype=np.uint8))


@pytest.fixture
def volumes() -> Corpus:
    return corpus("volume", np.random.default_rng(0).integers(0, 256, (5, 12, 1, 8, 8), dtype=np.uint8))


def test_stills_by_the_batch_equal_stills_one_by_one(stills: Corpus) -> None:
    """The short cut for arrays of the right size gives what the long way gives."""
    keys = [(0, row) for row in (4, 0, 7)]
    fast = ClipDataset(stills, data=DataConfig(frame_size=8).for_kind("image"))
    slow = ClipDataset(stills, data=DataConfig(frame_size=8).for_kind("image"))
    slow._stills = None
    one, other = fast.__getitems__(keys).batch, slow.__getitems__(keys).batch
    assert one is not None
    assert other is not None
    for name in ("frames", "lengths", "indices", "labels"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_evaluation_takes_the_centers_of_even_segments(volumes: Corpus) -> None:
    data = DataConfig(frame_size=8, num_frames=4, intensity="window", window_high=255).for_kind("volume")
    batch = ClipDataset(volumes, data=data).__getitems__([(0, 2)]).batch
    assert batch is not None
    wanted = torch.from_numpy(volumes.arrays[2, [1, 4, 7, 10]]).float() / 255  # type: ignore[index]
    torch.testing.assert_close(batch.frames[0], wanted)


def test_training_draws_depend_on_the_epoch_and_stay_in_their_segments(volumes: Corpus) -> None:
    data = DataConfig(frame_size=8, num_frames=4, intensity="window", window_high=255).for_kind("volume")
    dataset = ClipDataset(volumes, data=data, training=True)
    drawn = set()
    for epoch in range(12):
        batch = dataset.__getitems__([(epoch, 2)]).batch
        again = dataset.__getitems__([(epoch, 2)]).batch
        assert batch is not None
        assert again is not None
        assert torch.equal(batch.frames, again.frames)
        flat = torch.from_numpy(volumes.arrays[2]).float().flatten(1) / 255  # type: ignore[index]
        steps = torch.cdist(batch.frames[0].flatten(1), flat).argmin(dim=1).tolist()
        assert all(abs(step - (segment * 3 + 1)) <= 2 for segment, step in enumerate(steps))
        drawn.add(tuple(steps))
    assert len(drawn) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_keep_the_samplers_order(stills: Corpus, workers: int) -> None:
    rows = np.array([8, 2, 5, 1, 0], dtype=np.int64)
    dataset = ClipDataset(stills, data=DataConfig(frame_size=8).for_kind("image"))
    loader = ClipLoader(dataset, OrderedBatches(rows, batch_size=2), num_workers=workers)
    seen = [loaded.batch.indices.tolist() for loaded in loader if loaded.batch is not None]
    assert seen == [[8, 2], [5, 1], [0]]


def test_epoch_travels_with_the_batch(stills: Corpus) -> None:
    batches = EpochBatches(np.arange(9, dtype=np.int64), batch_size=4, seed=0, epoch=lambda: 7)
    dataset = ClipDataset(stills, data=DataConfig(frame_size=8).for_kind("image"))
    assert {loaded.epoch for loaded in ClipLoader(dataset, batches, num_workers=0)} == {7}


def test_array_rows_as_sources() -> None:
    array = np.zeros((6, 1, 4, 4), np.uint8)
    data = DataConfig(frame_size=4).for_kind("volume")
    with ArraySource(array, Path("x/0"), "volume", data) as source:
        assert source.unit == "mm"
        assert source.extent == (-0.5, 5.5)
        assert source.read([1, 4]).shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("kind", "arrays", "asked", "expected"),
    [("image", True, None, 0), ("image", True, 3, 3), ("video", False, 0, 0), ("video", False, None, None)],
)
def test_workers(kind: str, arrays: bool, asked: int | None, expected: int | None) -> None:
    manifest = build_manifest(Path(), ("a", "b"), ["1", "2"], [0, 1])
    array = np.zeros((2, 1, 3, 4, 4), np.uint8) if arrays else None
    corpus = Corpus("x", kind, ("a", "b"), manifest, array, None, 0, ())  # type: ignore[arg-type]
    workers = default_workers(corpus, asked)
    assert workers == expected if expected is not None else 1 <= workers <= 8


def test_windows_of_one_file_in_a_batch_share_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give what each gives alone; a broken neighbor closes the file and costs nobody else anything."""
    paths = [make_video(tmp_path / f"{name}.mp4", range(0, 1000, 40)) for name in "ab"]
    names = ["a.mp4", "a.mp4", "a.mp4", "b.mp4", "a.mp4"]
    starts, ends = np.array([0.0, 5.0, 0.4, 0.2, 0.6]), np.array([0.2, 6.0, 0.8, 0.4, 0.9])
    manifest = build_manifest(tmp_path, ("x", "y"), names, [0, 1, 0, 1, 0])
    manifest = replace(manifest, start_seconds=starts, end_seconds=ends)
    videos = Corpus("v", "video", ("x", "y"), manifest, None, None, 0, ())
    opened = []

    def counted(path: Path, **settings: object) -> object:
        opened.append(path.name)
        return open_source(path, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset_module, "open_source", counted)
    data = DataConfig(frame_size=16, num_frames=4).for_kind("video")
    together = ClipDataset(videos, data=data).__getitems__([(0, row) for row in (0, 2, 1, 4, 3)])
    assert opened == ["a.mp4", "a.mp4", "b.mp4"]  # again after the window that lies outside
    assert [row for row, _ in together.failures] == [1]
    assert together.batch is not None
    for place, row in enumerate((0, 2, 4, 3)):
        alone = ClipDataset(videos, data=data).__getitems__([(0, row)]).batch
        assert alone is not None
        assert torch.equal(alone.frames[0], together.batch.frames[place])
    assert all(path.exists() for path in paths)


def test_lengths_of_scans_come_from_their_headers(tmp_path: Path) -> None:
    names, depths = [], []
    for number, (shape, codes) in enumerate((((4, 5, 9), "RAS"), ((9, 4, 5), "SPL"), ((5, 7, 4), "ALI"))):
        affine = np.zeros((4, 4))
        for axis, code in enumerate(codes):
            affine["LRPAIS".index(code) // 2, axis] = 1 if code in "RAS" else -1
        affine[3, 3] = 1
        names.append(f"{number}.nii.gz")
        nib.Nifti1Image(np.ones(shape, np.uint8), affine).to_filename(tmp_path / names[-1])
        depths.append(next(side for side, code in zip(shape, codes, strict=True) if code in "SI"))
    (tmp_path / "bad.nii").write_bytes(b"nothing")
    manifest = build_manifest(tmp_path, ("a",), [*names, "bad.nii"], [0] * 4)
    scans = Corpus("x", "volume", ("a",), manifest, None, None, 0, ())
    rows, every = np.array([2, 0, 3, 1]), DataConfig(sampling="all").for_kind("volume")
    found = clip_lengths(scans, rows, data=every)
    assert found is not None
    assert found.tolist() == [depths[2], depths[0], 0, depths[1]]
    for name, depth in zip(names, depths, strict=True):
        with open_source(tmp_path / name, data=every) as source:
            assert len(source.positions) == depth
    assert clip_lengths(scans, rows, data=DataConfig().for_kind("volume")) is None
