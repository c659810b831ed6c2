import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from videogru.config import SPLITS
from videogru.data.manifests.columns import Coded
from videogru.data.manifests.manifest import Manifest, build_manifest
from videogru.data.manifests.splits import assign_splits
from videogru.errors import DataError


def whole(labels: list[int], splits: list[int] | None = None, groups: list[str] | None = None) -> Manifest:
    classes = [f"c{code}" for code in range(max(labels) + 1)]
    manifest = build_manifest(Path("/x"), classes, [f"{row:07d}.mp4" for row in range(len(labels))], labels, splits)
    if groups is None:
        return manifest
    return replace(manifest, groups=Coded.of(groups))


def counts(manifest: Manifest) -> dict[str, int]:
    return {split: len(manifest.rows(split)) for split in SPLITS}


def test_shares_are_exact_and_stratified() -> None:
    manifest = assign_splits(whole([0] * 100 + [1] * 40), val_fraction=0.15, test_fraction=0.2, seed=1)
    for code, size in ((0, 100), (1, 40)):
        of_class = np.bincount(manifest.splits[manifest.labels == code], minlength=3)
        assert of_class.tolist() == [size * 0.65, size * 0.15, size * 0.2]
    assert manifest.notes == ()


def test_seed_decides_and_row_order_does_not() -> None:
    manifest = whole([0, 1] * 50)
    first, same, other = (
        assign_splits(manifest, val_fraction=0.2, test_fraction=0.2, seed=s).splits for s in (3, 3, 4)
    )
    assert first.tolist() == same.tolist() != other.tolist()
    order = np.random.default_rng(0).permutation(100)
    shuffled = assign_splits(manifest.take(order), val_fraction=0.2, test_fraction=0.2, seed=3)
    assert shuffled.splits.tolist() == first[order].tolist()


def test_groups_stay_whole_and_count_by_their_majority() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 900)
    labels = np.where(rng.random(900) < 0.9, groups % 3, (groups + 1) % 3)
    manifest = whole(labels.tolist(), groups=[f"g{group}" for group in groups])
    split = assign_splits(manifest, val_fraction=0.2, test_fraction=0.2, seed=0)
    seen: dict[str, set[int]] = {}
    for group, code in zip(split.groups.tolist(), split.splits.tolist(), strict=True):
        seen.setdefault(group, set()).add(code)
    assert all(len(codes) == 1 for codes in seen.values())
    # By hand: 20 groups of each label, of which 12, 4 and 4.
    for label in range(3):
        chosen = [seen[f"g{group}"].copy().pop() for group in range(60) if group % 3 == label]
        assert np.bincount(chosen, minlength=3).tolist() == [12, 4, 4]


def test_set_splits_stay_and_val_is_carved_out_of_train() -> None:
    manifest = whole([0, 1] * 20, splits=[0] * 30 + [2] * 10)
    split = assign_splits(manifest, val_fraction=0.2, test_fraction=0.5, seed=0)
    assert counts(split) == {"train": 24, "val": 6, "test": 10}
    assert set(split.rows("test").tolist()) == set(range(30, 40))
    kept = assign_splits(manifest, val_fraction=0.0, test_fraction=0.5, seed=0)
    assert kept.splits.tolist() == manifest.splits.tolist()
    named = whole([0, 1] * 20, splits=[0] * 20 + [1] * 10 + [2] * 10)
    assert assign_splits(named, val_fraction=0.4, test_fraction=0.4, seed=0).splits.tolist() == named.splits.tolist()


def test_unset_rows_follow_their_group_and_named_splits_take_no_more() -> None:
    groups = ["a", "a", *(f"g{row}" for row in range(20))]
    manifest = whole([0, 0, *([0, 1] * 10)], splits=[2, -1, *([-1] * 20)], groups=groups)
    split = assign_splits(manifest, val_fraction=0.2, test_fraction=0.3, seed=0)
    assert split.splits[:2].tolist() == [2, 2]
    assert counts(split) == {"train": 16, "val": 4, "test": 2}


def test_thin_classes_go_to_train_first_and_are_named() -> None:
    manifest = whole([0] * 20 + [1] + [2] * 2 + [3] * 3)
    split = assign_splits(manifest, val_fraction=0.15, test_fraction=0.15, seed=0)
    assert split.splits[20] == 0
    assert sorted(split.splits[21:23].tolist()) == [0, 1]
    assert sorted(split.splits[23:].tolist()) == [0, 1, 2]
    assert split.notes == (
        "no rows in the val split, for want of groups: c1",
        "no rows in the test split, for want of groups: c1, c2",
    )


def test_what_cannot_be_trained_on_is_an_error() -> None:
    settings = {"val_fraction": 0.2, "test_fraction": 0.2, "seed": 0}
    with pytest.raises(DataError, match="1 class"):
        assign_splits(whole([0, 0, 0]), **settings)
    with pytest.raises(DataError, match="no training row"):
        assign_splits(whole([0, 1], splits=[2, 2]), **settings)
    with pytest.raises(DataError, match="have no label"):
        assign_splits(whole([0, 1, -1], splits=[0, 0, 0]), val_fraction=0.0, test_fraction=0.0, seed=0)
    with pytest.raises(DataError, match="nothing to train"):
        assign_splits(whole([0, 1]), val_fraction=0.5, test_fraction=0.5, seed=0)


def test_three_hundred_thousand_rows_take_seconds() -> None:
    count = 300_000
    rng = np.random.default_rng(0)
    manifest = whole(rng.integers(0, 400, count).tolist(), groups=[f"{g:06d}" for g in rng.integers(0, 100_000, count)])
    start = time.process_time()
    split = assign_splits(manifest, val_fraction=0.1, test_fraction=0.1, seed=0)
    assert time.process_time() - start < 5
    assert sum(counts(split).values()) == count
