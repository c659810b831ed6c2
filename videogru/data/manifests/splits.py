"""Deals the rows of a manifest out to train, val and test, group by group."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from videogru.config import SPLITS
from videogru.data.manifests.manifest import UNSET, Manifest
from videogru.errors import DataError


def assign_splits(manifest: Manifest, *, val_fraction: float, test_fraction: float, seed: int) -> Manifest:
    """Give every row a split; what is set stays, except that train lends to a val split that nobody named.

    Groups stay whole. The unset groups (or, where all are set but none is val, the groups of train) are shuffled by
    `seed` and dealt out within each label (a group's most frequent one) by the largest remainders of
    train : val : test. Of a label with n groups the first goes to train, the second to val and the third to test
    before the shares count; labels that a split lacks are named in `notes`. Unset groups without any label go to test.
    A fraction counts for nothing where its split is already named. The result depends on the set of groups, not on the
    order of rows.

    Raises DataError for fewer than two classes, for no training row, and for a training row without label.
    """
    if len(manifest.classes) < 2:
        what = f"{len(manifest.classes)} class ({', '.join(manifest.classes)}), at least 2 are needed"
        raise DataError(what, where=manifest.root)
    splits = manifest.splits.astype(np.int64)
    groups, count = manifest.groups.ranks()
    # Unset rows of a group that has a split follow it.
    group_split = np.full(count, UNSET, np.int64)
    np.maximum.at(group_split, groups, splits)
    named = set(np.unique(splits).tolist())
    train, val, test = range(len(SPLITS))
    shares = np.array([0.0, 0.0 if val in named else val_fraction, 0.0 if test in named else test_fraction])
    # What has no label can teach nothing, but can be predicted.
    labeled = np.zeros(count, bool)
    labeled[groups[manifest.labels >= 0]] = True
    group_split[(group_split == UNSET) & ~labeled] = test
    free = UNSET if (group_split == UNSET).any() else train
    pool = np.flatnonzero(group_split == free)
    # A published table may have a group in two splits; such rows stay where they are.
    movable = (splits == UNSET) | ((splits == free) & (group_split == free)[groups])
    if free == train:
        shares[test] = 0.0
    shares[train] = 1.0 - shares.sum()
    if shares[train] <= 0:
        raise DataError(f"val_fraction {val_fraction:g} and test_fraction {test_fraction:g} leave nothing to train on")
    dealt = False
    if len(pool) and (free == UNSET or shares[val] > 0):
        strata = _majority_labels(groups, manifest.labels, count)[pool]
        group_split[pool] = _deal(strata, shares, np.random.default_rng(seed).permutation(len(pool)))
        dealt = True
    assigned = np.where(movable, group_split[groups], splits).astype(np.int8)
    notes = _absent_classes(manifest, assigned, shares) if dealt else []
    training = manifest.labels[assigned == train]
    if not len(training):
        raise DataError(
            "no training row", where=manifest.root, hint="Set the split of some rows to train, or leave it empty."
        )
    if (training < 0).any():
        raise DataError(f"{int((training < 0).sum())} training rows have no label", where=manifest.root)
    return replace(manifest, splits=assigned, notes=(*manifest.notes, *notes))


def _majority_labels(groups: NDArray[np.int64], labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(count,) the most frequent label of each group, the smaller one of equals."""
    span = int(labels.max(initial=0)) + 2
    pairs, rows = np.unique(groups * span + labels + 1, return_counts=True)
    order = np.lexsort((-pairs, rows))  # most rows last, so that they are written last
    majority = np.empty(count, np.int64)
    majority[pairs[order] // span] = pairs[order] % span - 1
    return majority


def _deal(strata: NDArray[np.int64], shares: NDArray[np.float64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """(G,) split code of each group: within its stratum, in the order of `keys`, by largest remainder."""
    order = np.lexsort((keys, strata))
    dealt: list[NDArray[np.int64]] = []
    wanted = np.flatnonzero(shares > 0)
    for size in np.unique(strata, return_counts=True)[1].tolist():
        counts = np.floor(size * shares + 1e-9).astype(np.int64)
        remainders = size * shares - counts
        for split in np.argsort(-remainders, kind="stable")[: size - int(counts.sum())].tolist():
            counts[split] += 1
        for split in wanted[:size].tolist():
            if counts[split] == 0:
                counts[int(counts.argmax())] -= 1
                counts[split] = 1
        dealt.append(np.repeat(np.arange(len(shares)), counts))
    codes = np.empty(len(strata), np.int64)
    codes[order] = np.concatenate(dealt)
    return codes


def _absent_classes(manifest: Manifest, splits: NDArray[np.int8], shares: NDArray[np.float64]) -> list[str]:
    """Which classes have rows, but none in a split that was dealt."""
    labeled = manifest.labels >= 0
    place = manifest.labels[labeled] * len(SPLITS) + splits[labeled]
    counts = np.bincount(place, minlength=len(manifest.classes) * len(SPLITS)).reshape(-1, len(SPLITS))
    notes = []
    for code in np.flatnonzero(shares > 0).tolist():
        names = [manifest.classes[label] for label in np.flatnonzero((counts[:, code] == 0) & (counts.sum(axis=1) > 0))]
        if names:
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            notes.append(f"no rows in the {SPLITS[code]} split, for want of groups: {shown}")
    return notes
