"""Rows of a corpus as clips of features: what `ClipDataset` gives, with an encoder's maps in place of frames."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.loading.batching import Key, Loaded
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.feature_store import FeatureRows
from videogru.data.loading.worker_pool import Watch
from videogru.data.manifests.corpus import Corpus
from videogru.sequence import SequenceBatch


class FeatureDataset(ClipDataset):
    """Fetches whole batches of features by key (epoch, row); the frames of a batch are maps (B T D h w) float32."""

    def __init__(self, corpus: Corpus, features: FeatureRows, *, data: DataConfig) -> None:
        # No file is read here.
        super().__init__(corpus, data=data.model_copy(update={"cache": "none"}))
        self.features = features

    def load(self, keys: Sequence[Key], watch: Watch) -> Loaded:
        """One batch; rows that could not be encoded are its failures. Raises DataError where features are damaged."""
        epoch, entries = keys[0][0], {row: self.features.entries[row] for _, row in keys}
        failures = tuple((row, entry.error) for row, entry in entries.items() if entry.error)
        rows = [row for row, entry in entries.items() if not entry.error]
        if not rows:
            return Loaded(epoch, None, failures)
        lengths = [entries[row].length for row in rows]
        maps = torch.zeros(len(rows), max(lengths), *self.features.step)
        gaps = torch.zeros(len(rows), max(lengths))
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            maps.numpy()[place, :length] = self.features.read(row)
            gaps[place, :length] = torch.tensor(entries[row].gaps)
        labels = torch.from_numpy(self.corpus.manifest.labels[rows])
        batch = SequenceBatch(maps, torch.tensor(lengths), torch.tensor(rows), labels, gaps=gaps)
        return Loaded(epoch, batch, failures)


def feature_lengths(features: FeatureRows, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """(N,) steps of each row, for batches of like length; None where all are as long."""
    lengths = np.array([features.entries[int(row)].length for row in rows], np.int64)
    return lengths if len(np.unique(lengths)) > 1 else None
