import numpy as np
import pytest
import torch

from videogru.data.loading.batching import EpochBatches, Item, OrderedBatches, collate
from videogru.sequence import FrameSequence


def clip(steps: int, value: float = 1.0) -> FrameSequence:
    return FrameSequence(torch.full((steps, 1, 2, 3), value), torch.arange(steps, dtype=torch.float64), "mm")


def test_padding_comes_after_the_last_step() -> None:
    loaded = collate(0, [Item(4, 1, clip(3, 0.5)), Item(9, 0, clip(1, 0.25)), Item(2, 1, clip(2, 1.0))])
    batch = loaded.batch
    assert batch is not None
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.indices.tolist() == [4, 9, 2]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 1]
    for place, (steps, value) in enumerate([(3, 0.5), (1, 0.25), (2, 1.0)]):
        assert bool((batch.frames[place, :steps] == value).all())
        assert bool((batch.frames[place, steps:] == 0).all())


def test_bad_items_are_reported_and_never_replaced() -> None:
    loaded = collate(3, [Item(4, 1, None, "cut short"), Item(5, 0, clip(2))])
    assert loaded.failures == ((4, "cut short"),)
    assert loaded.batch is not None
    assert loaded.batch.indices.tolist() == [5]
    assert collate(3, [Item(4, 1, None, "cut short")]).batch is None


@pytest.mark.parametrize(("rows", "size", "world"), [(100, 32, 1), (97, 16, 1), (33, 32, 1), (97, 8, 3), (1, 4, 1)])
def test_every_row_once_an_epoch_in_even_batches(rows: int, size: int, world: int) -> None:
    wanted = np.arange(rows, dtype=np.int64) * 3
    parts = [
        list(EpochBatches(wanted, batch_size=size, seed=5, epoch=lambda: 2, rank=rank, world=world))
        for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1
    keys = [key for part in parts for batch in part for key in batch]
    assert sorted(row for _, row in keys) == wanted.tolist()
    assert {epoch for epoch, _ in keys} == {2}
    sizes = [len(batch) for part in parts for batch in part]
    assert min(sizes) >= 1
    assert max(sizes) <= max(size, -(-rows // world // max(1, rows // world // size)) + 1)
    assert max(sizes) - min(sizes) <= 2


def test_order_depends_on_seed_and_epoch_alone() -> None:
    rows = np.arange(50, dtype=np.int64)

    def order(seed: int, epoch: int) -> list:
        return [key[1] for batch in EpochBatches(rows, batch_size=7, seed=seed, epoch=lambda: epoch) for key in batch]

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)


def test_skip_leaves_out_the_head_of_one_epoch() -> None:
    batches = EpochBatches(np.arange(50, dtype=np.int64), batch_size=7, seed=1, epoch=lambda: 1)
    whole = list(batches)
    batches.skip = 3
    assert list(batches) == whole[3:]
    assert list(batches) == whole


def test_too_few_rows_for_the_processes() -> None:
    with pytest.raises(ValueError):
        EpochBatches(np.arange(2, dtype=np.int64), batch_size=1, seed=0, epoch=lambda: 0, rank=0, world=3)


def test_ordered_batches_keep_the_order() -> None:
    rows = np.array([5, 3, 8, 1, 9], dtype=np.int64)
    batches = OrderedBatches(rows, batch_size=2)
    assert [[row for _, row in batch] for batch in batches] == [[5, 3], [8, 1], [9]]
    assert len(batches) == 3


def padded_share(batches: EpochBatches, lengths: np.ndarray) -> float:
    """Padding over all steps of an epoch's batches."""
    valid = padded = 0
    for batch in batches:
        own = [int(lengths[row]) for _, row in batch]
        valid += sum(own)
        padded += max(own) * len(own) - sum(own)
    return padded / (valid + padded)


def test_batches_of_like_length_have_little_padding_and_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 500)
    rows = np.arange(500, dtype=np.int64)
    how = {"batch_size": 8, "seed": 3, "epoch": lambda: 2}
    plain, sorted_ = EpochBatches(rows, **how), EpochBatches(rows, **how, lengths=lengths)
    assert padded_share(plain, lengths) > 0.35
    assert padded_share(sorted_, lengths) < 0.08
    drawn = list(sorted_)
    assert sorted(row for batch in drawn for _, row in batch) == rows.tolist()
    assert len(drawn) == len(plain) and {len(batch) for batch in drawn} <= {7, 8}
    assert drawn == list(sorted_)  # a function of seed and epoch
    assert drawn != list(EpochBatches(rows, batch_size=8, seed=3, epoch=lambda: 3, lengths=lengths))
    # Neither short ones first nor long ones: the batches are shuffled.
    means = [np.mean([lengths[row] for _, row in batch]) for batch in drawn]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4
    sorted_.skip = 5
    assert list(sorted_) == drawn[5:]


def test_processes_share_batches_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 100)
    rows = np.arange(100, dtype=np.int64)
    parts = [
        [row for batch in EpochBatches(rows, batch_size=4, seed=0, epoch=lambda: 0, rank=rank, world=2, lengths=lengths)
         for _, row in batch]
        for rank in range(2)
    ]  # fmt: skip
    assert sorted(parts[0] + parts[1]) == rows.tolist()
