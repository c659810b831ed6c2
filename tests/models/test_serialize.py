"""Patterns against loops over indices, and the sizes the article names."""

import pytest
import torch

from videogru.config import ModelConfig
from videogru.models.encoders.encoder import build_encoder
from videogru.models.serialize import PATTERNS, serialize, step_size, steps_per_frame, valid_steps

B, T, D, H, W = 2, 3, 4, 2, 5


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(B, T, D, H, W, generator=torch.Generator().manual_seed(0))


def test_rows_are_rows_of_the_map(maps):
    steps = serialize(maps, "rows")
    assert steps.shape == (B, T * H, D * W)
    for t in range(T):
        for y in range(H):
            for d in range(D):
                for x in range(W):
                    assert torch.equal(steps[:, t * H + y, d * W + x], maps[:, t, d, y, x])


def test_columns_are_columns_of_the_map(maps):
    steps = serialize(maps, "cols")
    assert steps.shape == (B, T * W, D * H)
    for t in range(T):
        for x in range(W):
            for d in range(D):
                for y in range(H):
                    assert torch.equal(steps[:, t * W + x, d * H + y], maps[:, t, d, y, x])


def test_grid_is_every_cell_in_reading_order(maps):
    steps = serialize(maps, "grid")
    assert steps.shape == (B, T * H * W, D)
    cells = [maps[:, t, :, y, x] for t in range(T) for y in range(H) for x in range(W)]
    assert torch.equal(steps, torch.stack(cells, dim=1))


@pytest.mark.parametrize("seq", ["frames", "slices"])
def test_frames_are_means_over_the_map(maps, seq):
    steps = serialize(maps, seq)
    assert steps.shape == (B, T, D)
    expected = sum(maps[..., y, x] for y in range(H) for x in range(W)) / (H * W)
    torch.testing.assert_close(steps, expected)


@pytest.mark.parametrize("seq", sorted(PATTERNS))
def test_sizes_told_are_the_sizes_made(maps, seq):
    steps = serialize(maps, seq)
    assert steps.shape == (B, T * steps_per_frame(seq, H, W), step_size(seq, D, H, W))


@pytest.mark.parametrize(("seq", "steps", "size"), [("grid", 49, 512), ("rows", 7, 3584), ("cols", 7, 3584)])
def test_resnet18_at_224_gives_the_sequences_of_the_article(seq, steps, size):
    encoder = build_encoder(ModelConfig(encoder="resnet18"), in_channels=3, frame_size=224).eval()
    with torch.no_grad():
        maps = encoder(torch.zeros(1, 3, 224, 224)).unsqueeze(1)
    assert serialize(maps, seq).shape == (1, steps, size)
    assert (steps_per_frame(seq, *encoder.map_size(3, 224)), step_size(seq, 512, 7, 7)) == (steps, size)


def test_an_unknown_pattern_is_refused(maps):
    with pytest.raises(KeyError):
        serialize(maps, "spiral")


def test_valid_steps_marks_the_first_lengths():
    assert valid_steps(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]
