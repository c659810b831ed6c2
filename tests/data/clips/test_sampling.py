"""Sampling against hand-made index patterns and a loop over times."""

import numpy as np
import pytest

from videogru.data.clips import sampling

CFR = np.arange(10) / 10
VFR = np.array([0.0, 0.1, 0.2, 0.9, 1.8, 1.9])


def showing(positions: np.ndarray, time: float) -> int:
    return max(index for index, start in enumerate(positions) if start <= time)


def nearest(positions: np.ndarray, time: float) -> int:
    return min(range(len(positions)), key=lambda index: (abs(positions[index] - time), -index))


def test_uniform_takes_the_frame_showing_at_each_center() -> None:
    # 0..1 second in 4 segments: centers 0.125, 0.375, 0.625, 0.875
    assert sampling.uniform(positions=CFR, extent=(0.0, 1.0), num_frames=4).tolist() == [1, 3, 6, 8]


def test_a_long_frame_is_taken_once() -> None:
    # centers 0.25, 0.75, 1.25, 1.75: frames 2, 2, 3, 3
    assert sampling.uniform(positions=VFR, extent=(0.0, 2.0), num_frames=4).tolist() == [2, 3]


@pytest.mark.parametrize(("rule", "truth"), [("showing", showing), ("nearest", nearest)])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_uniform_and_random_against_a_loop(rule: str, truth, count: int) -> None:
    rng = np.random.default_rng(count)
    positions = np.cumsum(rng.uniform(0.01, 0.2, 40)) + 5
    extent = (float(positions[0]) - 0.01, float(positions[-1]) + 0.03)
    draws = rng.random(count)
    width = (extent[1] - extent[0]) / count
    for fractions, indices in (
        (np.full(count, 0.5), sampling.uniform(positions=positions, extent=extent, num_frames=count, rule=rule)),
        (draws, sampling.random(positions=positions, extent=extent, num_frames=count, draws=draws, rule=rule)),
    ):
        times = [extent[0] + (k + fraction) * width for k, fraction in enumerate(fractions)]
        expected = sorted({truth(positions, time) if time >= positions[0] else 0 for time in times})
        assert indices.dtype == np.int64
        assert indices.tolist() == expected


@pytest.mark.parametrize("rule", ["showing", "nearest"])
def test_a_short_source_gives_all_its_steps_once(rule: str) -> None:
    for count in (10, 11, 500):
        assert sampling.uniform(positions=CFR, extent=(0.0, 1.0), num_frames=count, rule=rule).tolist() == list(
            range(10)
        )
    draws = np.random.default_rng(0).random(12)
    drawn = sampling.random(positions=CFR, extent=(0.0, 1.0), num_frames=12, draws=draws, rule=rule)
    assert drawn.tolist() == list(range(10))


def test_random_stays_in_its_segments_and_follows_the_draws() -> None:
    low = sampling.random(positions=CFR, extent=(0.0, 1.0), num_frames=2, draws=np.zeros(2))
    high = sampling.random(positions=CFR, extent=(0.0, 1.0), num_frames=2, draws=np.full(2, 0.999))
    assert low.tolist() == [0, 5]
    assert high.tolist() == [4, 9]


def test_every_counts_frames_that_show_in_the_window() -> None:
    assert sampling.every(positions=CFR, extent=(0.25, 0.5)).tolist() == [2, 3, 4]
    assert sampling.every(positions=CFR, extent=(0.21, 0.22)).tolist() == [2]
    assert sampling.every(positions=CFR, extent=(-3.0, 0.05)).tolist() == [0]
    assert sampling.every(positions=CFR, extent=(0.95, 9.0)).tolist() == [9]
    assert sampling.every(positions=CFR, extent=(0.25, 0.5), rule="nearest").tolist() == [3, 4]


def test_slices_of_a_volume_lie_symmetrically() -> None:
    # 8 slices 3 mm apart, 4 wanted: centers at 1.5, 7.5, 13.5, 19.5 from the first slice's center
    positions = np.arange(8) * 3.0
    found = sampling.uniform(positions=positions, extent=(-1.5, 22.5), num_frames=4, rule="nearest")
    assert found.tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("positions", "extent"),
    [
        (np.empty(0), (0.0, 1.0)),
        (CFR, (0.5, 0.5)),
        (CFR, (0.6, 0.5)),
        (CFR, (-2.0, 0.0)),
        (CFR, (0.0, float("nan"))),
        (CFR, (0.0, float("inf"))),
        (CFR[::-1].copy(), (0.0, 1.0)),
        (np.array([0.0, np.nan]), (0.0, 1.0)),
    ],
)
def test_empty_or_broken_input_is_a_value_error(positions: np.ndarray, extent: tuple[float, float]) -> None:
    with pytest.raises(ValueError):
        sampling.every(positions=positions, extent=extent)
    with pytest.raises(ValueError):
        sampling.uniform(positions=positions, extent=extent, num_frames=2)


def test_bad_counts_and_draws_are_value_errors() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sampling.uniform(positions=CFR, extent=(0.0, 1.0), num_frames=0)
    with pytest.raises(ValueError, match="shape"):
        sampling.random(positions=CFR, extent=(0.0, 1.0), num_frames=3, draws=np.zeros(2))
    with pytest.raises(ValueError, match="0, 1"):
        sampling.random(positions=CFR, extent=(0.0, 1.0), num_frames=2, draws=np.array([0.0, 1.0]))


def test_several_places_interleave_and_the_middle_is_the_default() -> None:
    places = [sampling.uniform(positions=CFR, extent=(0.0, 1.0), num_frames=2, place=place) for place in (0.1, 0.7)]
    # segments 0..0.5 and 0.5..1: times 0.05 and 0.55, 0.35 and 0.85
    assert [place.tolist() for place in places] == [[0, 5], [3, 8]]
    middle = sampling.uniform(positions=CFR, extent=(0.0, 1.0), num_frames=3, place=0.5)
    assert middle.tolist() == sampling.uniform(positions=CFR, extent=(0.0, 1.0), num_frames=3).tolist()


@pytest.mark.parametrize(("rule", "truth"), [("showing", showing), ("nearest", nearest)])
@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_dense_against_a_loop(rule: str, truth, place: float) -> None:
    rng = np.random.default_rng(3)
    positions = np.cumsum(rng.uniform(0.01, 0.05, 200))
    start, end, stride, count = float(positions[0]), float(positions[-1]) + 0.03, 0.11, 8
    begin = start + place * (end - start - count * stride)
    expected = sorted({truth(positions, begin + (k + 0.5) * stride) for k in range(count)})
    found = sampling.dense(
        positions=positions, extent=(start, end), num_frames=count, stride=stride, place=place, rule=rule
    )
    assert found.tolist() == expected


def test_dense_keeps_its_stride_whatever_the_rate() -> None:
    for rate in (25, 50, 60):
        positions = np.arange(4 * rate) / rate
        found = sampling.dense(positions=positions, extent=(0.0, 4.0), num_frames=5, stride=0.2, place=0.5)
        assert np.allclose(np.diff(positions[found]), 0.2, atol=1 / rate)
        assert abs(float(positions[found].mean()) - 2.0) <= 1 / rate


def test_dense_in_a_short_extent_gives_what_lies_in_it() -> None:
    # strides 0.4 from 0 on: 0.2, 0.6, then 1.0 which is the end
    for place in (0.0, 0.5, 1.0):
        found = sampling.dense(positions=CFR, extent=(0.0, 1.0), num_frames=5, stride=0.4, place=place)
        assert found.tolist() == [2, 6]
    assert sampling.dense(positions=CFR, extent=(0.0, 1.0), num_frames=2, stride=9.0, place=0.0).tolist() == [5]


@pytest.mark.parametrize(
    "bad", [{"stride": 0.0}, {"stride": float("nan")}, {"place": -0.1}, {"place": 1.1}, {"num_frames": 0}]
)
def test_dense_refuses(bad: dict[str, float]) -> None:
    settings = {"num_frames": 2, "stride": 0.1, "place": 0.5} | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        sampling.dense(positions=CFR, extent=(0.0, 1.0), **settings)  # type: ignore[arg-type]


def test_a_place_outside_of_a_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="place"):
        sampling.uniform(positions=CFR, extent=(0.0, 1.0), num_frames=2, place=1.0)
