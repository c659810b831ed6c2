import pytest
import torch

from videogru.sequence import FrameSequence, SequenceBatch


def test_clip_shows_its_shape() -> None:
    clip = FrameSequence(torch.zeros(4, 3, 8, 6, dtype=torch.uint8), torch.arange(4.0, dtype=torch.float64), "seconds")
    assert "T=4 C=3 H=8 W=6" in repr(clip)
    assert len(clip) == 4


@pytest.mark.parametrize("positions", [[0.0, 0.0], [1.0, 0.5], [0.0], [0.0, 1.0, 2.0]])
def test_clip_refuses_positions_that_do_not_fit(positions: list[float]) -> None:
    with pytest.raises((ValueError, TypeError)):
        FrameSequence(torch.zeros(2, 1, 2, 2), torch.tensor(positions, dtype=torch.float64), "mm")


def test_clip_refuses_no_frames() -> None:
    with pytest.raises((ValueError, TypeError)):
        FrameSequence(torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.float64), "mm")


@pytest.mark.parametrize("lengths", [[1, 3], [0, 2], [2]])
def test_batch_refuses_lengths_that_do_not_fit(lengths: list[int]) -> None:
    with pytest.raises((ValueError, TypeError)):
        SequenceBatch(torch.zeros(2, 2, 1, 4, 4), torch.tensor(lengths), torch.arange(2))


def test_batch_moves_whole() -> None:
    batch = SequenceBatch(torch.zeros(2, 2, 1, 4, 4), torch.tensor([1, 2]), torch.arange(2), torch.tensor([0, 1]))
    moved = batch.to("meta")
    assert moved.frames.device.type == moved.lengths.device.type == "meta"
    assert moved.labels is not None
    assert moved.labels.device.type == "meta"
    assert len(batch) == 2
