"""Pairs of signatures that are nearly the same, without comparing each with each where there are many."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray

from videogru.data_check.perceptual_hash import MOTION_BITS, SCENE_BITS, SIGNATURE_BYTES

# Measured by tools/benchmarks/bench_duplicates.py, which shows what they tell apart.
STILL_SCENE = 0.1  # largest share of differing signs between two stills, or two clips without motion
MOVING_SCENE = 0.1  # between clips whose motion decides
MOTION = 0.04  # of the signs of the motion, in each quarter of the clip
_QUARTERS = 4
_QUARTER_BITS = MOTION_BITS // _QUARTERS
_LEAST_SIGNS = 16  # of a quarter's motion, for it to count
_SHARED = 0.4  # of their signs, at least, two near-duplicates have in the same places
_BANDS = 16
_KEY_BITS = 64
_COMPARED = 20_000_000  # pairs per band, about
_BLOCK = 1024
MOST_PAIRS = 1_000_000


class NearPairs(NamedTuple):
    """first, second: (P,) indices, first < second; distances: (P,) share of signs that differ; complete: all found."""

    first: Int64[np.ndarray, " P"]
    second: Int64[np.ndarray, " P"]
    distances: Float32[np.ndarray, " P"]
    complete: bool


def near_pairs(signatures: UInt8[np.ndarray, "N 320"], *, seed: int = 0) -> NearPairs:
    """Pairs of signatures that differ in few signs; signatures of zeros are near to none.

    Up to 6,000 signatures all pairs are compared. Beyond, only those that share a bucket in one of 16 bands: an LSH
    forest (Bawa, Condie and Ganesan 2005), whose keys are 64 drawn signs, the scene's before the motion's, cut where
    buckets get small. complete: False where there are more than a million pairs, and the search was given up.
    """
    shown = np.flatnonzero(signatures.any(axis=1))
    largest = max(64, 2 * _COMPARED // max(len(shown), 1))
    bands = 1 if len(shown) <= largest else _BANDS
    generator = np.random.default_rng(seed)
    found: list[NDArray[np.int64]] = []
    distances: list[NDArray[np.float32]] = []
    total = 0
    for _ in range(bands):
        for bucket in _buckets(signatures, shown, largest, generator):
            pairs, apart = _compare(signatures, bucket)
            if len(pairs):
                found.append(pairs)
                distances.append(apart)
                total += len(pairs)
            if total > MOST_PAIRS * bands:
                return NearPairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), False)
    if not found:
        return NearPairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), True)
    pairs, place = np.unique(np.concatenate(found), axis=0, return_index=True)
    return NearPairs(pairs[:, 0], pairs[:, 1], np.concatenate(distances)[place], True)


def _buckets(
    signatures: NDArray[np.uint8], shown: NDArray[np.int64], largest: int, generator: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Indices that share a key, cut to the shortest key for which a bucket holds at most `largest`."""
    if len(shown) <= largest:
        if len(shown) > 1:
            yield shown
        return
    # Positive signs only: what has no sign counts as negative.
    scene = generator.choice(SCENE_BITS - 1, _KEY_BITS // 2, replace=False) + 1
    motion = generator.choice(MOTION_BITS, _KEY_BITS // 2, replace=False) + SCENE_BITS
    keys = np.zeros(len(shown), np.uint64)
    for bit in np.concatenate([scene, motion]).tolist():
        value = signatures[shown, bit // 8] >> (7 - bit % 8) & 1
        keys = keys << np.uint64(1) | value.astype(np.uint64)
    order = np.argsort(keys, kind="stable")
    yield from _split(keys[order], shown[order], 0, largest)


def _split(
    keys: NDArray[np.uint64], members: NDArray[np.int64], depth: int, largest: int
) -> Iterator[NDArray[np.int64]]:
    if len(members) <= largest:
        if len(members) > 1:
            yield members
        return
    if depth == _KEY_BITS:
        # The same in all drawn signs: neighbors only, in overlapping windows.
        for start in range(0, len(members) - largest // 2, largest // 2):
            yield members[start : start + largest]
        return
    bit = np.uint64(_KEY_BITS - 1 - depth)
    middle = int(np.searchsorted((keys >> bit) & np.uint64(1), 1))
    yield from _split(keys[:middle], members[:middle], depth + 1, largest)
    yield from _split(keys[middle:], members[middle:], depth + 1, largest)


def _compare(
    signatures: NDArray[np.uint8], members: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Near pairs (P, 2) among the members, lower index first, and their distances (P,)."""
    members = np.sort(members)
    pairs, distances = [], []
    for row in range(0, len(members), _BLOCK):
        above = _signs(signatures[members[row : row + _BLOCK]])
        for column in range(row, len(members), _BLOCK):
            below = above if column == row else _signs(signatures[members[column : column + _BLOCK]])
            i, j, apart = _near(above, below)
            i, j = members[row + i], members[column + j]
            ordered = i < j
            pairs.append(np.stack([i, j], axis=1)[ordered])
            distances.append(apart[ordered])
    return np.concatenate(pairs), np.concatenate(distances)


def _signs(signatures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, positions) of -1, 0 and 1."""
    bits = np.unpackbits(signatures, axis=1).astype(np.float32)
    half = SIGNATURE_BYTES * 8 // 2
    signs: NDArray[np.float32] = bits[:, :half] - bits[:, half:]
    return signs


def _near(
    above: NDArray[np.float32], below: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    scene = _apart(above[:, :SCENE_BITS], below[:, :SCENE_BITS])[0]
    near = scene <= MOVING_SCENE
    if not near.any():
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    scene, near = scene[np.ix_(rows, columns)], near[np.ix_(rows, columns)]
    moving = np.zeros_like(near)
    worst = np.zeros_like(scene)
    for quarter in range(_QUARTERS):
        start = SCENE_BITS + quarter * _QUARTER_BITS
        place = slice(start, start + _QUARTER_BITS)
        apart, least, most = _apart(above[rows, place], below[columns, place])
        counts = most >= _LEAST_SIGNS
        # One moves and the other does not, or elsewhere.
        near &= ~counts | ((apart <= MOTION) & (least >= _SHARED * most))
        worst = np.where(counts, np.maximum(worst, apart), worst)
        moving |= counts
    near &= moving | (scene <= STILL_SCENE)
    i, j = np.nonzero(near)
    return rows[i], columns[j], np.where(moving, worst, scene)[i, j].astype(np.float32)


def _apart(
    above: NDArray[np.float32], below: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """(N M) share of differing signs among those both have (1 where they share too few), shared, and the larger."""
    has_above, has_below = np.abs(above), np.abs(below)
    shared = has_above @ has_below.T
    most = np.maximum(has_above.sum(axis=1)[:, None], has_below.sum(axis=1)[None, :])
    apart = np.where(shared >= _LEAST_SIGNS, (shared - above @ below.T) / 2 / np.maximum(shared, 1), 1)
    return apart.astype(np.float32), shared, most.astype(np.float32)
