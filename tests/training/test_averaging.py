"""The moving average of the weights against a loop in NumPy, and in a training of few steps."""

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from videogru.training.averaging import weight_average


def test_as_a_loop_makes_it_from_the_first_step_on():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    averaged = AveragedModel(net, use_buffers=True, **weight_average(0.9)._kwargs)
    weights = [torch.randn(2, 3, generator=generator) for _ in range(200)]
    wanted = None
    for step, weight in enumerate(weights):
        net[0].weight.data.copy_(weight)
        averaged.update_parameters(net)
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = weight.numpy() if wanted is None else decay * wanted + (1 - decay) * weight.numpy()
        np.testing.assert_allclose(averaged.module[0].weight.detach().numpy(), wanted, rtol=0, atol=1e-5)


def test_few_steps_do_not_end_with_what_they_began_with():
    net = nn.Linear(1, 1)
    averaged = AveragedModel(net, use_buffers=True, **weight_average(0.999)._kwargs)
    net.weight.data.zero_()
    averaged.update_parameters(net)
    net.weight.data.fill_(1.0)
    for _ in range(50):
        averaged.update_parameters(net)
    assert averaged.module.weight.item() > 0.99
