"""Long products of parameters: a few of the combinations always, the rest with the slow tests."""

from itertools import product
from typing import Any

import pytest


def thinned(*axes: list[Any], every: int) -> list[Any]:
    """Parameters of the product of `axes`: one in `every` runs always.

    Of several axes each value is among those; an AssertionError says where it is not.
    """
    combinations = list(product(*axes))
    for position, axis in enumerate(axes if len(axes) > 1 else ()):
        shown = [chosen[position] for chosen in combinations[::every]]
        assert all(value in shown for value in axis), f"every={every} leaves out values of {axis}"
    return [
        pytest.param(*chosen, marks=() if number % every == 0 else pytest.mark.slow)
        for number, chosen in enumerate(combinations)
    ]
