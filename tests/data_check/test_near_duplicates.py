"""Signatures and their neighbors, against pictures changed in known ways and a search that compares each with each."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from videogru.data_check import near_duplicates as near
from videogru.data_check.inspect import inspect_source
from videogru.data_check.near_duplicates import near_pairs
from videogru.data_check.perceptual_hash import SIGNATURE_BYTES, places, signatures, small_gray


def scene(seed: int, size: int = 96) -> np.ndarray:
    """A smooth colored picture, as different ones as seeds."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))


def still(pixels: np.ndarray) -> np.ndarray:
    return signatures(small_gray(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[None])[0]


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


CHANGES = {
    "jpeg": lambda p: as_jpeg(p, 40),
    "half the size": lambda p: np.asarray(Image.fromarray(p).resize((48, 48))),
    "crop of one pixel": lambda p: p[1:-1, 1:-1],
    "brighter": lambda p: np.clip(p.astype(int) * 1.1 + 10, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pictures_are_near_and_others_are_not(change: str) -> None:
    both = [still(scene(seed)) for seed in range(20)] + [still(CHANGES[change](scene(seed))) for seed in range(20)]
    found = near_pairs(np.stack(both))
    assert sorted(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(n, n + 20) for n in range(20)]
    assert found.complete


def test_what_shows_nothing_is_near_to_nothing() -> None:
    flat = np.stack([still(np.full((40, 40, 3), value, np.uint8)) for value in (0, 0, 255)])
    assert not flat.any()
    assert not len(near_pairs(flat).first)


def test_brightness_of_a_dct_wave_is_one_sign() -> None:
    """A cosine of the basis has its sign in its place alone."""
    x = np.cos(np.pi * (2 * np.arange(32) + 1) * 3 / 64)
    waves = np.broadcast_to(np.stack([x, -x]).reshape(2, 1, 1, 32), (2, 1, 32, 32)).astype(np.float32) * 50 + 100
    noise = np.random.default_rng(0).normal(0, 20, (1, 1, 32, 32)).astype(np.float32)
    plus, minus = near._signs(signatures(waves + noise))
    assert (plus[3], minus[3]) == (1, -1)


def test_the_forest_finds_what_comparing_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    pictures = generator.normal(0, 30, (1500, 1, 32, 32)).astype(np.float32)
    copies = pictures[:150] + generator.normal(0, 1, (150, 1, 32, 32)).astype(np.float32)
    everything = signatures(np.concatenate([pictures, copies]))
    exact = near_pairs(everything)
    assert set(zip(exact.first.tolist(), exact.second.tolist(), strict=True)) == {(n, n + 1500) for n in range(150)}
    # As if there were 200,000: buckets of 100 at most.
    monkeypatch.setattr(near, "_COMPARED", 100 * len(everything) // 2)
    found = near_pairs(everything)
    assert len(found.first) >= 148
    assert set(found.first.tolist()) <= set(range(150))


def test_too_many_pairs_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST_PAIRS", 10)
    same = np.repeat(still(scene(0))[None], 10, axis=0)
    assert not near_pairs(same).complete


def test_places_follow_time() -> None:
    # Half of the frames in the first tenth of the time.
    positions = np.concatenate([np.linspace(0, 1, 50, endpoint=False), np.linspace(1, 10, 50, endpoint=False)])
    chosen = places(positions, (0.0, 10.0))
    assert (positions[chosen] <= (np.arange(16) + 0.5) * 10 / 16).all()
    assert (positions[chosen] > (np.arange(16) + 0.5) * 10 / 16 - 0.2).all()
    assert places(np.zeros(1), (0.0, 1.0)).tolist() == [0]


def test_clips_of_the_same_mouth(shared_data: Path, tmp_path: Path) -> None:
    """60 sentences of one talker are no duplicates; the same sentence encoded anew is."""
    from videogru.config import DataConfig
    from videogru.data_check.duplicates import _unpacked

    clips = sorted((shared_data / "grid" / "videos").glob("*.mp4"))[:60]
    with av.open(str(clips[7])) as source, av.open(str(tmp_path / "again.mp4"), "w") as target:
        stream = target.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 88, 76, "yuv420p", 200_000
        for frame in source.decode(video=0):
            target.mux(stream.encode(frame.reformat(88, 76)))
        target.mux(stream.encode())
    data = DataConfig().for_kind("video")
    records = [
        inspect_source(str(path), root=Path("/"), kind="video", data=data) for path in [*clips, tmp_path / "again.mp4"]
    ]
    packed = _unpacked([record.signature for record in records])
    assert packed.shape == (61, SIGNATURE_BYTES)
    found = near_pairs(packed)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(7, 60)]


@pytest.mark.slow
def test_a_thousand_clips_of_one_mouth_are_no_duplicates() -> None:
    """The digits that ship: half a million pairs of different clips, of 0.4 to 0.7 seconds each."""
    from videogru.config import DataConfig
    from videogru.data.manifests.corpus import open_corpus
    from videogru.data_check.duplicates import _unpacked

    data = DataConfig(dataset="grid_digits").for_kind("video")
    manifest = open_corpus(data).manifest
    records = [inspect_source(source, root=manifest.root, kind="video", data=data) for source in manifest.sources]
    assert not len(near_pairs(_unpacked([record.signature for record in records])).first)
