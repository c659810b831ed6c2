"""Rows of a corpus as clips; a bad file becomes an item with its reason, never another clip."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from videogru.config import DataConfig, Kind
from videogru.data.augment import augment_volume, drop_steps, sampling_draws
from videogru.data.batching import Item, Key, Loaded, collate
from videogru.data.cache import FrameCache
from videogru.data.frames import FrameSource
from videogru.data.layouts import Corpus
from videogru.data.sources import open_source, read_clip, read_clips
from videogru.data.transforms import prepare_clip
from videogru.data.views import ONE_VIEW, Views, check_views, crop_places
from videogru.data.volume import chosen_axis, depth_of, patient_axes, to_unit_range
from videogru.data.volume_cache import VolumeCache
from videogru.data.watchdog import Crew, Watch, may_have_workers
from videogru.errors import ConfigError, SourceError
from videogru.sequence import FrameSequence, SequenceBatch, Unit

# Starting a worker costs about what it takes to read this many files.
_ROWS_WORTH_ANOTHER_WORKER = 8


class ClipDataset(Dataset[Loaded]):
    """Fetches whole batches by key (epoch, row). `training` samples at random and augments volumes.

    data: resolved for the corpus's kind (`DataConfig.for_kind`); views: of each row, instead of one clip, that many
    clips times that many crops, one after the other. Works in any worker process: files are opened there. Raises
    ConfigError where `data` has no such views, or asks to cache what is in memory.
    """

    def __init__(
        self, corpus: Corpus, *, data: DataConfig, seed: int = 0, training: bool = False, views: Views = ONE_VIEW
    ) -> None:
        check_views(views, data, corpus.kind)
        self.corpus, self.data, self.seed, self.training, self.views = corpus, data, seed, training, views
        self._last: FrameSource | None = None
        # The cache holds centered squares.
        if data.cache != "none" and corpus.arrays is not None:
            raise ConfigError(f"data.cache is for files; {corpus.name} is held in memory", hint="Leave it at none.")
        cached = data.cache != "none" and views[1] == 1
        self._cache = (VolumeCache if corpus.kind == "volume" else FrameCache)(data) if cached else None
        arrays = corpus.arrays
        wanted = (1, data.channels, data.frame_size, data.frame_size)
        # Stills that need no change are fetched as one slice of the array.
        self._stills = arrays if arrays is not None and arrays.shape[1:] == wanted and corpus.kind == "image" else None

    def __len__(self) -> int:
        return len(self.corpus.manifest)

    def __getitems__(self, keys: Sequence[Key]) -> Loaded:
        """One batch; all its keys share their epoch."""
        return self.load(keys, Watch())

    def load(self, keys: Sequence[Key], watch: Watch) -> Loaded:
        """The same as a watchdog's job: `watch` learns which row is at work, and refuses some."""
        epoch, rows = keys[0][0], [row for _, row in keys]
        if self._stills is None:
            with ExitStack() as opened:
                items = [self._items(epoch, row, opened, watch, place) for place, row in enumerate(rows)]
            return collate(epoch, [item for some in items for item in some])
        indices = torch.tensor(rows)
        frames = torch.from_numpy(self._stills[rows])
        labels = torch.from_numpy(self.corpus.manifest.labels[rows])
        return Loaded(epoch, SequenceBatch(frames, torch.ones_like(indices), indices, labels), ())

    def _items(self, epoch: int, row: int, opened: ExitStack, watch: Watch, place: int) -> list[Item]:
        label = int(self.corpus.manifest.labels[row])
        try:
            with watch.reading(place):
                source = self._shared(row, opened)
                index = source.positions
                clips = self._read(source, epoch, row)
                if source.positions is not index:
                    opened.close()  # corrected while reading: the next window must not know
        except SourceError as error:
            opened.close()
            where = error.where or self.corpus.manifest.path(row)
            return [Item(row, label, None, str(SourceError(error.what, where=where, hint=error.hint)))]
        if self.training:
            clips = [self._augmented(clip, source, epoch, row) for clip in clips]
        return [Item(row, label, clip) for clip in clips]

    def _augmented(self, clip: FrameSequence, source: FrameSource, epoch: int, row: int) -> FrameSequence:
        config, drawn = self.data.augment, {"seed": self.seed, "epoch": epoch, "index": row}
        if source.kind == "volume":
            order = patient_axes(source.details["axis"])  # type: ignore[arg-type]
            clip = clip.with_frames(augment_volume(clip.frames, config=config, order=order, **drawn))
        return drop_steps(clip, largest=config.drop_steps, **drawn)

    def _read(self, source: FrameSource, epoch: int, row: int) -> list[FrameSequence]:
        window = self.corpus.manifest.window(row)
        if self.training:
            draws = sampling_draws(self.seed, epoch, row, self.data.num_frames + 1)
            clips = [read_clip(source, data=self.data, draws=draws, window=window)]
        else:
            clips = read_clips(source, data=self.data, num_clips=self.views[0], window=window)
        if source.kind == "volume":
            source.close()  # resizing its slices needs room, too
        return [
            prepare_clip(clip, data=self.data, pixel_aspect=source.pixel_aspect, place=place)
            for clip in clips
            for place in crop_places(self.views[1])
        ]

    def _shared(self, row: int, opened: ExitStack) -> FrameSource:
        """The source of a row; neighbors in a batch that are windows of one video share it."""
        if self.corpus.arrays is not None:
            return self._open(row)
        if self.corpus.kind == "volume":
            return opened.enter_context(self._open(row))
        path = self.corpus.manifest.path(row)
        if self._last is None or self._last.path != path:
            opened.close()
            self._last = opened.enter_context(self._open(row))
            opened.callback(self._forget)
        return self._last

    def _open(self, row: int) -> FrameSource:
        if self.corpus.arrays is not None:
            path = Path(str(self.corpus.manifest.sources[row]))
            return ArraySource(self.corpus.arrays[row], path, self.corpus.kind, self.data)
        path = self.corpus.manifest.path(row)
        return self._cache.open(path) if self._cache else open_source(path, data=self.data, kind=self.corpus.kind)

    def _forget(self) -> None:
        self._last = None


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
        if volume:
            self.details["axis"] = chosen_axis(data.axis)

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


def clip_lengths(corpus: Corpus, rows: NDArray[np.int64], *, data: DataConfig) -> NDArray[np.int64] | None:
    """(N,) slices of each row's scan by its header, for batches of like length; None where no clip is as long as that.

    Only data.sampling=all gives clips of a scan's own depth. 0 for what a header does not tell: it is read, and fails
    or not, with the shortest.
    """
    if corpus.kind != "volume" or data.sampling != "all" or corpus.arrays is not None:
        return None
    return np.array([depth_of(corpus.manifest.path(int(row)), data=data) for row in rows], np.int64)


def default_workers(corpus: Corpus, asked: int | None, *, rows: int | None = None, sharing: int = 1) -> int:
    """Reader processes: as asked, else none for stills held in memory, else one per core but one, at most 8.

    rows: how many are to be read. For few of them one worker is enough; it is there to be watched. sharing: processes
    that train on this machine, each with readers of its own.
    """
    if asked is not None:
        return asked
    if (corpus.arrays is not None and corpus.kind == "image") or not may_have_workers():
        return 0
    if rows is not None and rows < _ROWS_WORTH_ANOTHER_WORKER:
        return 0 if corpus.arrays is not None else 1
    return max(1, min(8, len(os.sched_getaffinity(0)) // sharing - 1)) if hasattr(os, "sched_getaffinity") else 1


class ClipLoader:
    """Iterates over `Loaded` batches in the sampler's order, whatever the number of workers.

    With workers, a row whose decoder hangs (`data.decode_timeout_seconds`) or kills its process becomes a failure of
    its batch, and is not opened again as long as the loader lives; after a hang, nor is any window of its file.
    num_workers: 0 reads here, unwatched; persistent: workers outlive a pass; method: fork, spawn or forkserver. Raises
    DataError where workers die without reading.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        batches: Sampler[list[Key]],
        *,
        num_workers: int,
        persistent: bool = False,
        method: str | None = None,
    ) -> None:
        self.dataset, self.batches, self.num_workers = dataset, batches, num_workers
        self.persistent, self.method = persistent, method
        self._refused: dict[object, str] = {}
        self._crew: Crew | None = None

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Loaded]:
        if self.num_workers == 0:
            for keys in self.batches:
                yield self.dataset.load(keys, Watch())
            return
        if self._crew is not None and self._crew.running:  # by a pass that was left early
            self.close()
        crew = self._crew or self._recruit()
        self._crew = crew if self.persistent else None
        with contextlib.nullcontext() if self.persistent else contextlib.closing(crew):
            yield from crew.run(self.batches)

    def close(self) -> None:
        """End the workers that outlived their pass."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def _recruit(self) -> Crew:
        return Crew(
            self.dataset.load,
            num_workers=self.num_workers,
            timeout_seconds=self.dataset.data.decode_timeout_seconds,
            row_of=itemgetter(1),
            file_of=self._file_of,
            method=self.method,
            refused=self._refused,
        )

    def _file_of(self, key: Key) -> int | str:
        row = key[1]
        return row if self.dataset.corpus.arrays is not None else self.dataset.corpus.manifest.sources[row]
