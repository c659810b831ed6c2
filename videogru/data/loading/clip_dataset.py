"""Rows of a corpus as clips; a bad file becomes an item with its reason, never another clip."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from videogru.config import DataConfig
from videogru.data.clips.augment import augment_volume, drop_steps, sampling_draws
from videogru.data.clips.read_clip import read_clip, read_clips
from videogru.data.clips.transforms import prepare_clip
from videogru.data.clips.views import ONE_VIEW, Views, check_views, crop_places
from videogru.data.loading.batching import Item, Key, Loaded, collate
from videogru.data.loading.frame_cache import FrameCache
from videogru.data.loading.volume_cache import VolumeCache
from videogru.data.loading.worker_pool import Watch
from videogru.data.manifests.corpus import Corpus
from videogru.data.readers.array_source import ArraySource
from videogru.data.readers.open import open_source
from videogru.data.readers.source import FrameSource
from videogru.data.readers.volume.volume import depth_of, patient_axes
from videogru.errors import ConfigError, SourceError
from videogru.sequence import FrameSequence, SequenceBatch


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


def clip_lengths(corpus: Corpus, rows: NDArray[np.int64], *, data: DataConfig) -> NDArray[np.int64] | None:
    """(N,) slices of each row's scan by its header, for batches of like length; None where no clip is as long as that.

    Only data.sampling=all gives clips of a scan's own depth. 0 for what a header does not tell: it is read, and fails
    or not, with the shortest.
    """
    if corpus.kind != "volume" or data.sampling != "all" or corpus.arrays is not None:
        return None
    return np.array([depth_of(corpus.manifest.path(int(row)), data=data) for row in rows], np.int64)
