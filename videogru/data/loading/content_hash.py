"""What a row's source is, by its content: SHA-256 of its files or of its array, so that a copy is the same source.

A file is read once, and again when its size, inode, time of change or of its inode's change is another; the last one
cannot be set back by hand. What changed within the last two seconds is read each time: two changes may share a tick of
the clock.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from videogru.data.loading.volume_cache import files_of
from videogru.data.manifests.corpus import Corpus

_RECENT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Identity:
    """content: SHA-256 in hex; stamp: of the file's facts, by which a change is seen without reading it, '' if none."""

    content: str
    stamp: str


class Identities:
    """The identities of a corpus's rows. known: by source, from before."""

    def __init__(self, corpus: Corpus, known: Mapping[str, Identity] | None = None) -> None:
        self.corpus = corpus
        self._known = dict(known or {})

    def of(self, row: int) -> Identity:
        """Raises OSError where a file cannot be read."""
        arrays = self.corpus.arrays
        if arrays is not None:
            array = np.ascontiguousarray(arrays[row])
            head = f"{array.dtype.str} {array.shape}\n".encode()
            return Identity(hashlib.sha256(head + array.tobytes()).hexdigest(), "")
        source, path = self.corpus.manifest.sources[row], self.corpus.manifest.path(row)
        known, stamp = self._known.get(source), stamp_of(path)
        if known is not None and stamp and known.stamp == stamp:
            return known
        found = hashlib.sha256()
        for name, file in files_of(path):
            with file.open("rb") as content:
                found.update(f"{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        # What changes while it is read has no stamp, and is read again the next time.
        identity = Identity(found.hexdigest(), stamp if stamp == stamp_of(path) else "")
        self._known[source] = identity
        return identity


def stamp_of(path: Path) -> str:
    """Facts of all files of a source as SHA-256 in hex; '' where one of them has just changed. Raises OSError."""
    newest, facts = 0.0, []
    for name, file in files_of(path):
        stat = file.stat()
        newest = max(newest, stat.st_mtime, stat.st_ctime)
        facts.append((name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
    if abs(time.time() - newest) < _RECENT_SECONDS:
        return ""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()
