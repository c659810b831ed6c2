"""Rows of a corpus as clips; a bad file becomes an item with its reason, never another clip."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from videogru.config import DataConfig, Kind
from videogru.data.augment import augment_volume, sampling_draws
from videogru.data.batching import Item, Key, Loaded, collate
from videogru.data.frames import FrameSource
from videogru.data.layouts import Corpus
from videogru.data.sources import open_source, read_clip
from videogru.data.transforms import prepare_clip
from videogru.data.volume import to_unit_range
from videogru.data.worker import start_worker
from videogru.errors import SourceError
from videogru.sequence import SequenceBatch, Unit


class ClipDataset(Dataset[Loaded]):
    """Fetches whole batches by key (epoch, row). `training` samples at random and augments volumes.

    data: resolved for the corpus's kind (`DataConfig.for_kind`). Works in any worker process: files are opened there.
    """

    def __init__(self, corpus: Corpus, *, data: DataConfig, seed: int = 0, training: bool = False) -> None:
        self.corpus, self.data, self.seed, self.training = corpus, data, seed, training
        arrays = corpus.arrays
        wanted = (1, data.channels, data.frame_size, data.frame_size)
        # Stills that need no change are fetched as one slice of the array.
        self._stills = arrays if arrays is not None and arrays.shape[1:] == wanted and corpus.kind == "image" else None

    def __len__(self) -> int:
        return len(self.corpus.manifest)

    def __getitems__(self, keys: list[Key]) -> Loaded:
        """One batch; all its keys share their epoch."""
        epoch, rows = keys[0][0], [row for _, row in keys]
        if self._stills is None:
            return collate(epoch, [self._item(epoch, row) for row in rows])
        indices = torch.tensor(rows)
        frames = torch.from_numpy(self._stills[rows])
        labels = torch.from_numpy(self.corpus.manifest.labels[rows])
        return Loaded(epoch, SequenceBatch(frames, torch.ones_like(indices), indices, labels), ())

    def _item(self, epoch: int, row: int) -> Item:
        label = int(self.corpus.manifest.labels[row])
        draws = sampling_draws(self.seed, epoch, row, self.data.num_frames) if self.training else None
        try:
            with self._open(row) as source:
                clip = read_clip(source, data=self.data, draws=draws, window=self.corpus.manifest.window(row))
                try:
                    clip = prepare_clip(clip, data=self.data, pixel_aspect=source.pixel_aspect)
                except SourceError as error:
                    raise SourceError(error.what, where=source.path, hint=error.hint) from error
        except SourceError as error:
            return Item(row, label, None, str(error))
        if self.training and self.corpus.kind == "volume":
            clip = clip.with_frames(
                augment_volume(clip.frames, config=self.data.augment, seed=self.seed, epoch=epoch, index=row)
            )
        return Item(row, label, clip)

    def _open(self, row: int) -> FrameSource:
        if self.corpus.arrays is not None:
            return ArraySource(
                self.corpus.arrays[row], Path(str(self.corpus.manifest.sources[row])), self.corpus.kind, self.data
            )
        return open_source(self.corpus.manifest.path(row), data=self.data, kind=self.corpus.kind)


class ArraySource:
    """One row of an array-backed corpus (T C H W) as a source; a volume's slices count as 1 mm apart."""

    def __init__(self, array: NDArray[np.uint8], path: Path, kind: Kind, data: DataConfig) -> None:
        self.path, self.kind, self._array, self._data = path, kind, array, data
        volume = kind == "volume"
        self.unit: Unit = "mm" if volume else "index"
        self.positions = np.arange(len(array), dtype=np.float64)
        self.extent = (-0.5, len(array) - 0.5) if volume else (0.0, float(len(array)))
        self.pixel_aspect = 1.0
        self.details: dict[str, object] = {"shape": list(array.shape)}

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The steps at `indices`; the intensity window of a volume sees all of it, as it does for a file."""
        chosen = list(indices)
        if self.kind == "volume":
            return torch.from_numpy(to_unit_range(self._array, self._data)[chosen])
        return torch.from_numpy(self._array[chosen])

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> "ArraySource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_workers(corpus: Corpus, asked: int | None, *, sharing: int = 1) -> int:
    """Reader processes: as asked, else none for stills held in memory, else one per core but one, at most 8.

    sharing: processes that train on this machine, each with readers of its own.
    """
    if asked is not None:
        return asked
    if corpus.arrays is not None and corpus.kind == "image":
        return 0
    return max(1, min(8, len(os.sched_getaffinity(0)) // sharing - 1)) if hasattr(os, "sched_getaffinity") else 1


def make_loader(
    dataset: ClipDataset, batches: Sampler[list[Key]], *, num_workers: int, persistent: bool = False
) -> DataLoader[Loaded]:
    """A loader of `Loaded` batches in the sampler's order, whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=start_worker if num_workers else None,
    )


def _as_it_is(batch: Loaded) -> Loaded:
    return batch
