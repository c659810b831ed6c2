"""Batches of clips, read in this process or in reader processes."""

import contextlib
import os
from collections.abc import Iterator
from operator import itemgetter

from torch.utils.data import Sampler

from videogru.data.loading.batching import Key, Loaded
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.worker_pool import Crew, Watch, may_have_workers
from videogru.data.manifests.corpus import Corpus

# Starting a worker costs about what it takes to read this many files.
_ROWS_WORTH_ANOTHER_WORKER = 8


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
