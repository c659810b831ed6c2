"""Clips of different lengths as one padded batch, and the order in which rows are read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from videogru.sequence import FrameSequence, SequenceBatch
from videogru.shapes import Gaps

_POOL = 16
Key = tuple[int, int]  # (epoch, manifest row): all that a sample depends on besides the seed


@dataclass(frozen=True, slots=True)
class Item:
    """One sample as a worker hands it over: a clip, or the reason why there is none."""

    row: int
    label: int
    clip: FrameSequence | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a loader yields: the readable clips as a batch (None if there are none), and (row, reason) of the others."""

    epoch: int
    batch: SequenceBatch | None
    failures: tuple[tuple[int, str], ...]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Loaded":
        """The batch on another device."""
        batch = None if self.batch is None else self.batch.to(device, non_blocking=non_blocking)
        return Loaded(self.epoch, batch, self.failures)


def collate(epoch: int, items: list[Item]) -> Loaded:
    """The items as one batch, in order; frames are padded with zeros after their last step."""
    failures = tuple((item.row, item.error) for item in items if item.clip is None)
    good = [(item, item.clip) for item in items if item.clip is not None]
    if not good:
        return Loaded(epoch, None, failures)
    clips = [clip for _, clip in good]
    lengths = [len(clip) for clip in clips]
    longest = max(lengths)
    if min(lengths) == longest:
        frames = torch.stack([clip.frames for clip in clips])
    else:
        frames = clips[0].frames.new_zeros((len(clips), longest, *clips[0].frames.shape[1:]))
        for position, clip in enumerate(clips):
            frames[position, : len(clip)] = clip.frames
    labels = torch.tensor([item.label for item, _ in good])
    rows = torch.tensor([item.row for item, _ in good])
    batch = SequenceBatch(frames, torch.tensor(lengths), rows, labels, gaps=_gaps(clips, longest))
    return Loaded(epoch, batch, failures)


def _gaps(clips: list[FrameSequence], steps: int) -> Gaps:
    gaps = torch.zeros(len(clips), steps)
    for place, clip in enumerate(clips):
        gaps[place, 1 : len(clip)] = clip.positions.diff()
    return gaps


class EpochBatches(Sampler[list[Key]]):
    """Batches of (epoch, row): every row once an epoch, shuffled by (seed, epoch), cut evenly over the processes.

    lengths: (N,) steps of each row, where they differ and are known. Rows are then sorted by them within every 16
    batches, and the batches are shuffled again, so that little of a batch is padding.

    Batch sizes differ by at most one (a last batch of one clip would upset batch normalization), and no process is left
    without a share. `skip` batches are left out of the next pass only: that is how a run resumes inside an epoch.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        world: int = 1,
        lengths: NDArray[np.int64] | None = None,
    ) -> None:
        if len(rows) < world:
            raise ValueError(f"{len(rows)} rows cannot be shared by {world} processes")
        self.rows, self.seed, self.epoch, self.lengths = rows, seed, epoch, lengths
        self.rank, self.world = rank, world
        self.batches = min(-(-len(rows) // (batch_size * world)), len(rows) // world)
        self.skip = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, skip, self.skip = self.epoch(), self.skip, 0
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(len(self.rows))
        batches = np.array_split(order, self.batches)
        if self.lengths is not None:
            batches = _by_length(batches, self.lengths)
            batches = [batches[place] for place in draw.permutation(len(batches))]
        for places in batches[skip:]:
            batch = self.rows[places]
            yield [(epoch, int(row)) for row in np.array_split(batch, self.world)[self.rank]]


def _by_length(batches: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Batches of the same sizes, sorted by length within each _POOL of them."""
    found: list[NDArray[np.int64]] = []
    for start in range(0, len(batches), _POOL):
        pool = batches[start : start + _POOL]
        places = np.concatenate(pool)
        places = places[np.argsort(lengths[places], kind="stable")]
        found += np.split(places, np.cumsum([len(batch) for batch in pool])[:-1])
    return found


class OrderedBatches(Sampler[list[Key]]):
    """Batches of (0, row) in the given order, for validation and inference."""

    def __init__(self, rows: NDArray[np.int64], *, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield [(0, int(row)) for row in self.rows[start : start + self.batch_size]]
