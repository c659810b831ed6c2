import numpy as np
import pytest

from videogru.data.readers.video.timestamps import increasing, spread


@pytest.mark.parametrize(
    ("stamps", "answer"),
    [
        ([], True),
        ([5], True),
        ([1, 2, 9], True),
        ([1, 1], False),
        ([2, 1], False),
        ([None], False),
        ([1, None, 3], False),
    ],
)
def test_increasing(stamps: list[int | None], answer: bool) -> None:
    assert increasing(stamps) is answer


@pytest.mark.parametrize(
    ("stamps", "places"),
    [
        ([5], [5]),
        ([1, 4, 9], [1, 4, 9]),
        ([0, 0, 2, 4, 4, 4], [0, 1, 2, 4, 4 + 2 / 3, 4 + 4 / 3]),
        ([7, 7, 7], None),
        ([3, 2], None),
        ([1, None, 3], None),
    ],
)
def test_spread(stamps: list[int | None], places: list[float] | None) -> None:
    found = spread(stamps)
    if places is None:
        assert found is None
    else:
        assert found is not None
        np.testing.assert_allclose(found, places, rtol=1e-12)
        assert bool((np.diff(found) > 0).all())
