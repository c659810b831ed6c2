"""Runs the encoder over the rows of a corpus once, and keeps what it makes of each clip, as `eval` reads it."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.loading.batching import Loaded, OrderedBatches
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.clip_loader import ClipLoader, default_workers
from videogru.data.loading.feature_store import Entry, FeatureWriter
from videogru.data.manifests.corpus import Corpus
from videogru.models.classifier import Classifier


@torch.inference_mode()
def encode_rows(
    classifier: Classifier,
    corpus: Corpus,
    entries: Mapping[int, Entry],
    writer: FeatureWriter,
    *,
    data: DataConfig,
    means: bool,
    batch_size: int = 32,
    num_workers: int | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> None:
    """Encode the rows that `entries` names by their manifest row, and add them to `writer`.

    classifier: in eval mode, on its device; data: resolved for the corpus's kind; means: of maps over h and w are kept,
    not the maps; tick: called with the number of rows finished since the last call. A source that cannot be read
    becomes an entry with its reason. What is done is kept, also where this raises or is interrupted.
    """
    rows = np.array(sorted(entries), np.int64)
    workers = default_workers(corpus, num_workers, rows=len(rows))
    loader = ClipLoader(
        ClipDataset(corpus, data=data), OrderedBatches(rows, batch_size=batch_size), num_workers=workers
    )
    try:
        for loaded in loader:
            for row, reason in loaded.failures:
                writer.fail(entries[row], reason)
            if loaded.batch is not None:
                for row, features, gaps in _encoded(classifier, loaded, means=means):
                    if np.isfinite(features).all():
                        writer.add(entries[row], features, gaps)
                    else:
                        writer.fail(entries[row], f"{entries[row].source}: the encoder gives no finite features")
            tick(len(loaded.failures) + (0 if loaded.batch is None else len(loaded.batch)))
    finally:
        writer.flush()


def _encoded(
    classifier: Classifier, loaded: Loaded, *, means: bool
) -> list[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """(row, features (T D h w), gaps (T,)) of each clip, without padding."""
    batch = loaded.batch
    assert batch is not None
    device = next(classifier.parameters()).device
    maps = classifier.maps(batch.frames.to(device), batch.lengths.to(device)).float()
    if means:
        maps = reduce(maps, "b t d h w -> b t d 1 1", "mean")
    kept = maps.cpu().numpy()
    gaps = np.zeros(kept.shape[:2], np.float32) if batch.gaps is None else batch.gaps.numpy()
    spans = zip(batch.indices.tolist(), batch.lengths.tolist(), strict=True)
    return [(row, kept[place, :length], gaps[place, :length]) for place, (row, length) in enumerate(spans)]
