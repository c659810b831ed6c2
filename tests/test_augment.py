import math

import numpy as np
import pytest
import torch

from videogru.config import AugmentConfig
from videogru.data.augment import augment_batch, augment_volume, sampling_draws

EVERYTHING = AugmentConfig(
    flip=0.5, rotate_degrees=20, scale=0.2, translate=0.1, brightness=0.1, contrast=0.2, noise=0.05, erase=0.5
)


def clips(count: int = 6, size: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, 1, size, size, generator=torch.Generator().manual_seed(1))


def full(frames: torch.Tensor) -> torch.Tensor:
    return torch.full((len(frames),), frames.shape[1])


def test_padding_changes_nothing() -> None:
    """A short clip is changed alike alone and padded beside a longer one; the padding stays empty."""
    frames = clips(2)
    frames[0, 1:] = 0
    key = {"config": EVERYTHING, "seed": 3, "epoch": 2}
    together = augment_batch(frames, torch.tensor([1, 3]), indices=[7, 1], **key)
    alone = augment_batch(frames[:1, :1], torch.tensor([1]), indices=[7], **key)
    torch.testing.assert_close(together[0, :1], alone[0], atol=1e-6, rtol=0)
    assert not together[0, 1:].any()


def test_a_clip_is_changed_alike_in_any_batch() -> None:
    frames = clips()
    together = augment_batch(frames, full(frames), config=EVERYTHING, seed=3, epoch=2, indices=[7, 1, 5, 0, 9, 4])
    for place, index in enumerate([7, 1, 5, 0, 9, 4]):
        alone = augment_batch(
            frames[place : place + 1], full(frames)[:1], config=EVERYTHING, seed=3, epoch=2, indices=[index]
        )
        torch.testing.assert_close(alone[0], together[place], atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 3}, {"indices": [8]}])
def test_seed_epoch_and_index_each_matter(change: dict) -> None:
    key = {"seed": 3, "epoch": 2, "indices": [7]}
    frames = clips(1)
    one = augment_batch(frames, full(frames), config=EVERYTHING, **key)
    other = augment_batch(frames, full(frames), config=EVERYTHING, **{**key, **change})
    assert not torch.equal(one, other)


def test_no_augmentation_only_scales() -> None:
    frames = torch.randint(0, 256, (2, 1, 3, 4, 4), dtype=torch.uint8)
    same = augment_batch(frames, full(frames), config=AugmentConfig(), seed=0, epoch=0, indices=[0, 1])
    assert torch.equal(same, frames.float() / 255)


def test_flips_mirror_the_width_about_half_of_the_time() -> None:
    frames = clips(1).expand(400, -1, -1, -1, -1)
    flipped = augment_batch(
        frames, full(frames), config=AugmentConfig(flip=0.5), seed=0, epoch=0, indices=list(range(400))
    )
    mirrored = torch.tensor([torch.allclose(clip, frames[0].flip(-1), atol=1e-5) for clip in flipped])
    unchanged = torch.tensor([torch.allclose(clip, frames[0], atol=1e-5) for clip in flipped])
    assert bool((mirrored | unchanged).all())
    assert 160 < int(mirrored.sum()) < 240


def test_shifts_copy_whole_pixels() -> None:
    frames = clips(1, size=16).expand(50, -1, -1, -1, -1)
    shifted = augment_batch(
        frames, full(frames), config=AugmentConfig(translate=0.125), seed=0, epoch=0, indices=list(range(50))
    )
    seen = set()
    padded = torch.nn.functional.pad(frames[0], (2, 2, 2, 2), mode="reflect")
    symmetric = torch.from_numpy(np.pad(frames[0].numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="symmetric"))
    assert padded.shape == symmetric.shape
    for clip in shifted:
        places = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.allclose(clip, symmetric[..., dy : dy + 16, dx : dx + 16], atol=1e-4)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 12


def test_rotation_turns_about_the_center() -> None:
    size = 33
    frames = torch.zeros(1, 1, 1, size, size)
    frames[..., 16, 24] = 1.0
    config = AugmentConfig(rotate_degrees=30)
    for index in range(8):
        turned = augment_batch(frames, full(frames), config=config, seed=0, epoch=0, indices=[index])[0, 0, 0]
        weight = turned.sum()
        y = (turned.sum(dim=1) * torch.arange(size)).sum() / weight - 16
        x = (turned.sum(dim=0) * torch.arange(size)).sum() / weight - 16
        assert math.hypot(float(x), float(y)) == pytest.approx(8, abs=0.5)
        assert abs(math.degrees(math.atan2(float(y), float(x)))) <= 33


def test_erasing_fills_one_square_with_the_mean() -> None:
    frames = clips(1, size=32)
    config = AugmentConfig(erase=0.99)
    erased = augment_batch(frames, full(frames), config=config, seed=0, epoch=0, indices=[0])
    changed = (erased != frames)[0, 0, 0]
    assert 0.01 < float(changed.float().mean()) <= 0.27
    assert torch.allclose(erased[0, 0, 0][changed], frames[0].mean())


def test_volume_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    frames = torch.zeros(10, 1, 12, 14)
    frames[2:7, :, 3:9, 4:10] = 1.0
    key = {"seed": 1, "epoch": 2, "index": 3}
    once = augment_volume(frames, config=EVERYTHING, **key)
    augment_volume(frames, config=EVERYTHING, seed=9, epoch=9, index=9)
    again = augment_volume(frames, config=EVERYTHING, **key)
    assert torch.equal(once, again)
    assert once.shape == frames.shape
    assert once.dtype == torch.float32
    assert not torch.equal(once, frames)
    for change in ({"seed": 2}, {"epoch": 1}, {"index": 4}):
        assert not torch.equal(once, augment_volume(frames, config=EVERYTHING, **{**key, **change}))


def test_volume_moves_in_depth_too() -> None:
    frames = torch.zeros(11, 1, 11, 11)
    frames[5, 0, 5, 5] = 1.0
    centers = []
    for index in range(12):
        moved = augment_volume(frames, config=AugmentConfig(translate=0.3), seed=0, epoch=0, index=index)
        centers.append(float((moved.sum(dim=(1, 2, 3)) * torch.arange(11)).sum() / moved.sum()))
    assert max(centers) - min(centers) > 1.5


def test_sampling_draws_are_reproducible_and_apart() -> None:
    assert np.array_equal(sampling_draws(1, 2, 3, 5), sampling_draws(1, 2, 3, 5))
    assert not np.array_equal(sampling_draws(1, 2, 3, 5), sampling_draws(1, 2, 4, 5))
    assert ((sampling_draws(1, 2, 3, 500) >= 0) & (sampling_draws(1, 2, 3, 500) < 1)).all()
