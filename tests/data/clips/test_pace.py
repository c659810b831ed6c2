"""Frames chosen as they come are those that sampling chooses with all of them at hand."""

import math

import numpy as np
import pytest

from videogru.data.clips import sampling
from videogru.data.clips.pace import Pace


def taken(positions: np.ndarray, end: float, step: float | None) -> list[int]:
    pace, ends = Pace(step), [*positions[1:], end]
    return [index for index, shown in enumerate(zip(positions, ends, strict=True)) if pace.takes(*shown)]


@pytest.mark.parametrize("seed", range(30))
def test_chooses_as_sampling_does(seed):
    draw = np.random.default_rng(seed)
    usual = draw.uniform(0.01, 0.1)
    shows = usual * np.where(draw.random(60) < 0.2, draw.uniform(0.2, 4, 60), 1)  # of variable rate
    positions = draw.uniform(-1, 5) + np.concatenate(([0.0], np.cumsum(shows)[:-1]))
    end = float(positions[-1] + shows[-1])
    extent = (float(positions[0]), end)
    for step in (usual * draw.uniform(0.3, 1), usual, usual * draw.uniform(1, 9)):
        count = math.ceil((end - extent[0]) / step)
        expected = sampling.dense(positions=positions, extent=extent, num_frames=count, stride=step, place=0.0)
        assert taken(positions, end, step) == expected.tolist()
    count = int(draw.integers(2, 40))
    expected = sampling.uniform(positions=positions, extent=extent, num_frames=count)
    assert taken(positions, end, (end - extent[0]) / count) == expected.tolist()


def test_at_25_frames_a_second():
    positions = np.arange(12) / 25
    assert taken(positions, 12 / 25, 0.1) == [1, 3, 6, 8, 11]  # 0.05, 0.15, 0.25, 0.35, 0.45 seconds
    assert taken(positions, 12 / 25, 0.01) == taken(positions, 12 / 25, None) == list(range(12))


def test_after_a_gap_one_frame_stands_for_the_times_in_it():
    pace = Pace(1.0)
    shown = [(0.0, 0.4), (0.4, 0.8), (7.0, 7.2), (7.2, 7.4), (7.4, 7.6), (9.0, 9.1), (9.1, 9.4)]
    assert [pace.takes(*each) for each in shown] == [False, True, True, False, True, True, False]


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_step_is_above_zero(step):
    with pytest.raises(ValueError, match="above 0"):
        Pace(step)
