"""An exponential moving average of the weights that is of use in short trainings too."""

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


def weight_average(decay: float) -> WeightAveraging:
    """Averages weights and buffers after every step; validation and the saved model see the average.

    After n steps the decay is at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage with num_updates:
    else a training of few steps would end with much of the weights that it began with.
    """
    return WeightAveraging(use_buffers=True, avg_fn=_Average(decay))


class _Average:
    """(average, weight, steps so far) -> the next average."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        decay = torch.as_tensor((1 + steps) / (10 + steps)).clamp(max=self.decay)
        return decay * averaged + (1 - decay) * current
