"""Against torch's own optimizers, and against an exact singular value decomposition."""

import pytest
import torch
from torch import nn

from videogru.config import TrainConfig
from videogru.training.groups import muon_groups
from videogru.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (12, 5)])
def test_matrices_step_as_with_torchs_muon(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([{"params": [mine], "muon": True, "lr": 0.1, "weight_decay": 0.02}])
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.02, momentum=0.95)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        torchs.step()
    assert not torch.equal(mine, start)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_steps_as_its_matrix_of_outputs_by_all_else(memory_format):
    kernel = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    whole = nn.Parameter(kernel.clone(memory_format=memory_format))
    whole.grad = gradient.clone(memory_format=memory_format)
    flat = nn.Parameter(kernel.flatten(1).clone())
    flat.grad = gradient.flatten(1).clone()
    for parameter in (whole, flat):
        Muon([{"params": [parameter], "muon": True, "lr": 0.1, "weight_decay": 0.0}]).step()
    torch.testing.assert_close(whole.flatten(1), flat, rtol=0, atol=1e-6)


def test_kernels_of_volumes_step_too():
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    groups = muon_groups(net, TrainConfig(optimizer="muon", muon_lr=0.1, weight_decay=0.0))
    assert [group["params"] for group in groups if group.get("muon")] == [[net[2].weight]]
    flat = nn.Parameter(net[2].weight.detach().flatten(1).clone())
    net[2].weight.grad = torch.randn(net[2].weight.shape, generator=torch.Generator().manual_seed(1))
    flat.grad = net[2].weight.grad.flatten(1).clone()
    Muon(groups).step()
    Muon([{"params": [flat], "muon": True, "lr": 0.1, "weight_decay": 0.0}]).step()
    torch.testing.assert_close(net[2].weight.flatten(1), flat, rtol=0, atol=1e-6)


def test_gates_step_each_as_a_matrix_of_its_own():
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    whole = nn.Parameter(weight.clone())
    whole.grad = gradient.clone()
    gates = [nn.Parameter(gate.clone()) for gate in weight.chunk(3)]
    for gate, part in zip(gates, gradient.chunk(3), strict=True):
        gate.grad = part.clone()
    Muon([{"params": [whole], "muon": True, "gates": 3, "lr": 0.1, "weight_decay": 0.1}]).step()
    Muon([{"params": gates, "muon": True, "lr": 0.1, "weight_decay": 0.1}]).step()
    torch.testing.assert_close(whole.detach(), torch.cat([gate.detach() for gate in gates]), rtol=0, atol=1e-6)


def test_everything_else_steps_as_with_adamw():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([{"params": [mine], "lr": 0.01, "weight_decay": 0.1}])
    torchs = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for step in range(5):
        gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(step + 1))
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_orthogonal_means_singular_values_near_one_and_the_same_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    near = orthogonalize(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(near)
    assert values.min() > 0.6 and values.max() < 1.3
    between = left.T @ near @ right.T
    assert (between - torch.diag(between.diag())).abs().max() < 0.05


def test_a_gradient_of_zero_moves_nothing_to_nan():
    parameter = nn.Parameter(torch.ones(3, 4))
    parameter.grad = torch.zeros(3, 4)
    Muon([{"params": [parameter], "muon": True, "lr": 0.1, "weight_decay": 0.0}]).step()
    torch.testing.assert_close(parameter.detach(), torch.ones(3, 4))


def test_a_saved_state_goes_on_exactly():
    def made() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2))
        return net, Muon(muon_groups(net, TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.1)))

    def train(net: nn.Module, optimizer: Muon, steps: range) -> None:
        for step in steps:
            frames = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(frames).square().mean().backward()
            optimizer.step()

    whole, optimizer = made()
    train(whole, optimizer, range(6))
    first, optimizer = made()
    train(first, optimizer, range(3))
    second, resumed = made()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(3, 6))
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
