import numpy as np
import pytest
import torch
from PIL import Image

from videogru.config import DataConfig
from videogru.data.clips.transforms import fit_frames, prepare_clip, to_channels
from videogru.errors import SourceError
from videogru.sequence import FrameSequence


def ramp(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


def test_luma_is_pillows() -> None:
    frames = ramp(9, 7)
    ours = to_channels(frames, 1)
    for frame, gray in zip(frames, ours, strict=True):
        pillow = np.asarray(Image.fromarray(frame.permute(1, 2, 0).numpy()).convert("L"))
        assert np.abs(pillow.astype(int) - gray[0].numpy()).max() <= 1


def test_gray_becomes_three_equal_channels() -> None:
    frames = torch.rand(2, 1, 4, 4)
    assert torch.equal(to_channels(frames, 3), frames.repeat(1, 3, 1, 1))


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (33, 47)])
def test_resizing_is_pillows_antialiased_bilinear(height: int, width: int) -> None:
    frames = ramp(height, width)
    ours = fit_frames(frames, size=16, fit="stretch")
    for frame, small in zip(frames, ours, strict=True):
        pillow = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        difference = np.asarray(pillow).astype(int) - small.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 1


def test_crop_keeps_the_center_and_pad_keeps_all() -> None:
    frames = torch.zeros(1, 1, 20, 60)
    frames[..., 20:40] = 1.0
    cropped = fit_frames(frames, size=20, fit="crop")
    assert torch.equal(cropped, torch.ones(1, 1, 20, 20))
    padded = fit_frames(frames, size=60, fit="pad")
    assert torch.equal(padded[..., 20:40, :], frames)
    assert padded.sum() == frames.sum()


def test_pixels_that_are_no_squares() -> None:
    """60 x 20 pixels, each three times as tall as wide, are 180 x 20 as they look."""
    frames = torch.ones(1, 1, 60, 20)
    padded = fit_frames(frames, size=90, fit="pad", pixel_aspect=3.0)
    columns = padded[0, 0].amax(dim=0) > 0
    assert int(columns.sum()) == 10
    assert bool(padded[0, 0].amax(dim=1).all())


def test_nothing_happens_to_frames_of_the_right_size() -> None:
    frames = ramp(16, 16)
    assert torch.equal(fit_frames(frames, size=16, fit="crop"), frames)


def test_a_sliver_is_refused() -> None:
    with pytest.raises(SourceError, match="pad"):
        fit_frames(torch.zeros(1, 1, 1, 5000), size=112, fit="crop")


def test_prepare_keeps_positions_and_type() -> None:
    positions = torch.tensor([0.0, 0.5], dtype=torch.float64)
    clip = FrameSequence(ramp(30, 40), positions, "seconds")
    data = DataConfig(frame_size=16, channels=1).for_kind("video")
    prepared = prepare_clip(clip, data=data)
    assert prepared.frames.shape == (2, 1, 16, 16)
    assert prepared.frames.dtype == torch.uint8
    assert torch.equal(prepared.positions, positions)
