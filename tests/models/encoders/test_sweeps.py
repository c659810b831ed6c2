"""Against a loop over rows and columns of patches, with one-step GRU cells."""

import pytest
import torch
from torch import nn

from videogru.models.encoders.sweeps import Sweep


def both_ways(gru: nn.GRU, steps: torch.Tensor) -> torch.Tensor:
    """One sequence (S D) read forward and backward, step by step."""
    halves = []
    for suffix, order in (("", range(len(steps))), ("_reverse", range(len(steps) - 1, -1, -1))):
        w, u = getattr(gru, f"weight_ih_l0{suffix}"), getattr(gru, f"weight_hh_l0{suffix}")
        b, c = getattr(gru, f"bias_ih_l0{suffix}"), getattr(gru, f"bias_hh_l0{suffix}")
        state, states = steps.new_zeros(gru.hidden_size), [steps.new_zeros(0)] * len(steps)
        for step in order:
            (r, z, n), (s, y, m) = (w @ steps[step] + b).chunk(3), (u @ state + c).chunk(3)
            update = torch.sigmoid(z + y)
            state = (1 - update) * torch.tanh(n + torch.sigmoid(r + s) * m) + update * state
            states[step] = state
        halves.append(torch.stack(states))
    return torch.cat(halves, dim=1)


def by_hand(sweep: Sweep, frame: torch.Tensor) -> torch.Tensor:
    """(C H W) -> (D h w), cell by cell."""
    p = sweep.patch
    h, w = frame.shape[1] // p, frame.shape[2] // p
    patches = [
        [frame[:, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten() for j in range(w)] for i in range(h)
    ]  # fmt: skip
    rows = [sweep.across_norm(both_ways(sweep.across, torch.stack(line))) for line in patches]
    columns = [
        sweep.down_norm(both_ways(sweep.down, torch.stack([rows[i][j] for i in range(h)]))) for j in range(w)
    ]  # fmt: skip
    cells = torch.stack([torch.stack([rows[i][j] + columns[j][i] for j in range(w)]) for i in range(h)])
    return cells.permute(2, 0, 1)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_equals_a_loop_over_cells(patch):
    torch.manual_seed(0)
    sweep = Sweep(2, 3, patch).double()
    for name, parameter in sweep.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    frames = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    maps = sweep(frames)
    assert maps.shape == (2, 6, 6 // patch, 6 // patch)
    for mine, frame in zip(maps, frames, strict=True):
        torch.testing.assert_close(mine, by_hand(sweep, frame), rtol=0, atol=1e-12)


def test_edges_that_fill_no_patch_are_padded_with_zeros():
    torch.manual_seed(0)
    sweep = Sweep(1, 2, 4).double()
    frames = torch.randn(1, 1, 6, 5, dtype=torch.float64)
    padded = nn.functional.pad(frames, (0, 3, 0, 2))
    torch.testing.assert_close(sweep(frames), sweep(padded), rtol=0, atol=0)
    assert sweep(frames).shape == (1, 4, 2, 2)


def test_gradients_are_those_of_the_function():
    torch.manual_seed(0)
    sweep = Sweep(1, 2, 2).double()
    frames = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sweep, (frames,))
    sweep(frames).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sweep.parameters())


def test_every_cell_sees_the_whole_frame():
    torch.manual_seed(0)
    sweep = Sweep(1, 4, 1).double()
    frames = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    for i, j in ((0, 0), (1, 3), (3, 4)):
        (gradient,) = torch.autograd.grad(sweep(frames)[0, :, i, j].square().sum(), frames)
        assert (gradient != 0).all()


def test_float32_under_autocast():
    sweep = Sweep(3, 4, 2)
    frames = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sweep(frames.bfloat16())
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, sweep(frames.bfloat16().float()))
