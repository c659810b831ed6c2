import math

import numpy as np
import pytest
import torch

from videogru.config import AugmentConfig
from videogru.data.clips.augment import augment_batch, augment_volume, mix_batch, sampling_draws
from videogru.sequence import SequenceBatch

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
    frames, indices = clips(), [7, 1, 1023, 0, 1024, 50_000]
    together = augment_batch(frames, full(frames), config=EVERYTHING, seed=3, epoch=2, indices=indices)
    for place, index in enumerate(indices):
        alone = augment_batch(
            frames[place : place + 1], full(frames)[:1], config=EVERYTHING, seed=3, epoch=2, indices=[index]
        )
        torch.testing.assert_close(alone[0], together[place], atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 3}, {"indices": [8]}, {"indices": [7 + 1024]}])
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


def batch_of(lengths: list[int], size: int = 8) -> SequenceBatch:
    """Clip i is filled with the value i + 1 and has the label i."""
    count, longest = len(lengths), max(lengths)
    frames = torch.arange(1.0, count + 1).view(-1, 1, 1, 1, 1).expand(-1, longest, 3, size, size).clone()
    return SequenceBatch(frames, torch.tensor(lengths), torch.arange(10, 10 + count), torch.arange(count))


def test_cutmix_puts_a_box_of_the_next_clip_and_counts_its_pixels() -> None:
    batch = batch_of([2] * 40)
    mixed = mix_batch(batch, probability=0.7, seed=1, epoch=3)
    assert mixed.others is not None and mixed.shares is not None
    boxes = 0
    for place in range(40):
        following = (place + 1) % 40
        assert int(mixed.others[place]) == following
        frame = mixed.frames[place, 0, 0]
        theirs = frame == following + 1
        assert (frame[~theirs] == place + 1).all()
        assert (mixed.frames[place] == frame).all()  # alike in all steps and channels
        assert float(mixed.shares[place]) == pytest.approx(1 - theirs.float().mean().item())
        if theirs.any():
            rows, cols = theirs.nonzero().unbind(1)
            assert theirs.sum() == (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)  # one full box
            boxes += 1
    assert 18 <= boxes <= 36
    torch.testing.assert_close(batch.frames, batch_of([2] * 40).frames)  # the given one is untouched


def test_cutmix_covers_any_share_of_the_area() -> None:
    shares = mix_batch(batch_of([1] * 400, size=32), probability=0.999, seed=0, epoch=0).shares
    assert shares is not None
    assert shares.min() < 0.3 and shares.max() > 0.95
    assert 0.55 < float(shares.mean()) < 0.75  # boxes of half the area on average, cut at the edges


def test_clips_of_unequal_length_are_not_mixed() -> None:
    batch = batch_of([2, 1, 1, 2])
    mixed = mix_batch(batch, probability=0.999, seed=0, epoch=0)
    assert mixed.shares is not None
    for place in (0, 2):  # 2 beside 1, 1 beside 2
        assert torch.equal(mixed.frames[place], batch.frames[place])
        assert mixed.shares[place] == 1


@pytest.mark.parametrize("change", [{"seed": 5}, {"epoch": 1}])
def test_cutmix_follows_seed_and_epoch(change: dict) -> None:
    batch, key = batch_of([1] * 8), {"probability": 0.9, "seed": 0, "epoch": 0}
    first, again = mix_batch(batch, **key), mix_batch(batch, **key)
    other = mix_batch(batch, **{**key, **change})
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


def test_without_labels_partners_or_probability_nothing_is_mixed() -> None:
    batch = batch_of([1, 1])
    assert mix_batch(batch, probability=0.0, seed=0, epoch=0) is batch
    unlabeled = SequenceBatch(batch.frames, batch.lengths, batch.indices)
    assert mix_batch(unlabeled, probability=0.9, seed=0, epoch=0) is unlabeled
    alone = batch_of([1])
    assert mix_batch(alone, probability=0.9, seed=0, epoch=0) is alone


def test_cutmix_alone_changes_no_single_clip() -> None:
    frames = clips()
    only = AugmentConfig(cutmix=0.5)
    assert torch.equal(augment_batch(frames, full(frames), config=only, seed=0, epoch=0, indices=[0] * 6), frames)


@pytest.mark.parametrize("size", [(32, 32), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("change", [{"flip": 0.5}, {"translate": 0.9}, {"flip": 0.5, "translate": 0.125}])
def test_copied_pixels_are_those_of_a_resampling(size, dtype, change) -> None:
    """Mirrors and shifts are indexed; grid_sample, which turns and zooms need, gives the same."""
    frames = torch.randint(0, 256, (32, 2, 3, *size), dtype=torch.uint8)
    frames = frames if dtype == torch.uint8 else frames.float() / 255
    config = AugmentConfig(**change)
    key = {"seed": 3, "epoch": 2, "indices": list(range(32))}
    copied = augment_batch(frames, full(frames), config=config, **key)
    # A zoom this small moves no pixel by a tenth of its size.
    resampled = augment_batch(frames, full(frames), config=config.model_copy(update={"scale": 1e-7}), **key)
    torch.testing.assert_close(copied, resampled, rtol=0, atol=1e-4)
    assert not torch.equal(copied, frames if dtype == torch.float32 else frames.float() / 255)


@pytest.mark.parametrize(
    ("axes", "order", "mirrored"), [("x", "zyx", 3), ("z", "zyx", 0), ("y", "yzx", 0), ("x", "xzy", 0)]
)
def test_volumes_are_mirrored_along_the_patients_axes_that_allow_it(axes: str, order: str, mirrored: int) -> None:
    frames = torch.rand(5, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    config = AugmentConfig(flip=0.5, flip_axes=axes)
    seen = set()
    for index in range(16):
        changed = augment_volume(frames, config=config, order=order, seed=0, epoch=0, index=index)
        seen.add(torch.equal(changed, frames.flip(mirrored)))
        assert torch.equal(changed, frames) or torch.equal(changed, frames.flip(mirrored))
    assert seen == {True, False}


def test_a_bias_field_is_smooth_and_gamma_keeps_order() -> None:
    flat = torch.full((8, 1, 16, 16), 0.5)
    biased = augment_volume(flat, config=AugmentConfig(bias_field=0.1), seed=0, epoch=0, index=1)
    ratio = biased / flat
    assert float(ratio.std()) > 0.02
    for axis in (0, 2, 3):
        # A polynomial of the third degree: its fourth differences are zero.
        assert float(ratio.log().diff(n=4, dim=axis).abs().max()) < 1e-4
        assert float(ratio.log().diff(dim=axis).abs().max()) > 1e-3
    ramp = torch.linspace(0, 1, 8 * 256).view(8, 1, 16, 16)
    bent = augment_volume(ramp, config=AugmentConfig(gamma=0.5), seed=0, epoch=0, index=2)
    assert bool((bent.flatten().diff() >= 0).all())
    assert float((bent - ramp).abs().max()) > 0.02
    power = (bent.flatten()[1:-1].log() / ramp.flatten()[1:-1].log()).median()
    torch.testing.assert_close(bent, ramp**power, rtol=0, atol=1e-3)
    assert 1 / 1.5 <= float(power) <= 1.5
