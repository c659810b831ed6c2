"""Percentiles by counting, against NumPy's."""

import numpy as np
import pytest

from videogru.data.readers.volume.percentiles import finite_percentiles


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "<i2", ">i2", "<u2", ">u2", "i4", "u8", "f2", "<f4", ">f4", "f8"])
@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (-0.5, 40.0), (3e-5, -1e3)])
@pytest.mark.parametrize("wanted", [(0.0, 100.0), (0.5, 99.5), (33.3, 66.7)])
def test_as_numpy_has_it(dtype: str, slope: float, intercept: float, wanted: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 1), (1, 2, 1), (7, 11, 13)):
        stored = (rng.normal(0 if np.dtype(dtype).kind in "if" else 90, 30, shape)).astype(dtype)[:, ::-1].T
        found = finite_percentiles(stored, *wanted, slope=slope, intercept=intercept)
        np.testing.assert_allclose(found, np.percentile(stored.astype(float) * slope + intercept, wanted), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2"])
def test_the_ends_of_a_type(dtype: str) -> None:
    ends = np.iinfo(dtype)
    stored = np.array([ends.max, ends.min], dtype)
    assert finite_percentiles(stored, 0.0, 100.0, slope=1.0, intercept=0.0) == (ends.min, ends.max)
    assert finite_percentiles(stored, 0.0, 50.0, slope=1.0, intercept=0.0) == (ends.min, (ends.min + ends.max) / 2)


def test_what_is_not_finite_does_not_count() -> None:
    stored = np.array([np.nan, 1, np.inf, 3, -np.inf], np.float32)
    assert finite_percentiles(stored, 0.0, 50.0, slope=2.0, intercept=1.0) == (3.0, 5.0)
    assert finite_percentiles(stored[:1], 0.0, 50.0, slope=2.0, intercept=1.0) is None
    assert finite_percentiles(np.zeros((0, 3, 3), np.int16), 0.0, 50.0, slope=2.0, intercept=1.0) is None
