"""Sources with the same content: the same file, the same pixels (re-muxed), or nearly the same pictures (re-encoded).

Two of them in different splits are a leak: a test on them tests nothing. With different labels they are a conflict.
"""

import base64
import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from videogru.config import SPLITS
from videogru.data.manifests.manifest import Manifest
from videogru.data_check.near_duplicates import MOST_PAIRS, near_pairs
from videogru.data_check.perceptual_hash import SIGNATURE_BYTES
from videogru.data_check.results import Finding, Record, whole_text

Same = Literal["file", "pixels", "nearly"]
_SAID: dict[Same, str] = {"file": "the same file as", "pixels": "the same pixels as", "nearly": "nearly the same as"}


@dataclass(frozen=True, eq=False)
class Uses:
    """What a manifest makes of each of S sources. splits: (S,) bits, 1 << code; labels: (S,) the label, -1 where it is
    unknown or there are several; whole: (S,) no row of it has a window; names: class names.
    """

    sources: Sequence[str]
    splits: NDArray[np.int64]
    labels: NDArray[np.int64]
    whole: NDArray[np.bool_]
    names: tuple[str, ...]

    def split(self, source: int) -> str:
        """Its split, or several."""
        return "+".join(name for code, name in enumerate(SPLITS) if self.splits[source] >> code & 1)

    def label(self, source: int) -> str:
        """Its label, '' where it is unknown or there are several."""
        return self.names[self.labels[source]] if self.labels[source] >= 0 else ""


def uses_of(manifest: Manifest, sources: Sequence[str], source_of: NDArray[np.int64]) -> Uses:
    """source_of: (N,) the source, an index into `sources`, of each row of the manifest."""
    count = len(sources)
    splits, largest = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    smallest = np.full(count, np.iinfo(np.int64).max)
    whole = np.ones(count, np.bool_)
    set_ = manifest.splits >= 0
    np.bitwise_or.at(splits, source_of[set_], 1 << manifest.splits[set_].astype(np.int64))
    np.maximum.at(largest, source_of, manifest.labels)
    np.minimum.at(smallest, source_of, manifest.labels)
    whole[source_of[~np.isnan(manifest.start_seconds)]] = False
    return Uses(sources, splits, np.where(largest == smallest, largest, -1), whole, manifest.classes)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sources with the same content, by index; the first is in the earlier split. distance: 0..1, of `near`."""

    first: int
    second: int
    same: Same
    distance: float
    leak: bool
    conflict: bool


@dataclass(frozen=True)
class Duplicates:
    """Pairs that connect all sources of the same content, leaks first; leaking: sources of val and test whose content
    is in train as well; complete: False where the search for near-duplicates was given up.
    """

    pairs: list[Pair]
    leaking: int
    complete: bool


def find_duplicates(records: Sequence[Record], uses: Uses) -> Duplicates:
    """records: of uses.sources, in their order; those without content (bad ones) are no duplicates."""
    forest = _Forest(len(records))
    pairs: list[Pair] = []

    def connect(first: int, second: int, same: Same, distance: float) -> None:
        if forest.join(first, second):
            a, b = sorted((first, second), key=lambda one: (_first_split(uses, one), one))
            known = uses.whole[a] and uses.whole[b] and uses.labels[a] >= 0 <= uses.labels[b]
            conflict = bool(known and uses.labels[a] != uses.labels[b])
            pairs.append(Pair(a, b, same, distance, _apart(uses, a, b), conflict))

    good = [place for place, record in enumerate(records) if record.status == "ok"]
    for same, key in (("file", "file_hash"), ("pixels", "pixel_hash")):
        leaders: dict[str, int] = {}
        # Copies are compared with the one in the earliest split, so that each copy in another one shows as a leak.
        for place in sorted(good, key=lambda one: (_first_split(uses, one), one)):
            content = getattr(records[place], key)
            if content:
                connect(leaders.setdefault(content, place), place, same, 0.0)  # type: ignore[arg-type]
    leaders_only = [place for place in good if forest.root(place) == place and records[place].signature]
    found = near_pairs(_unpacked([records[place].signature for place in leaders_only]))
    order = sorted(
        range(len(found.first)),
        key=lambda one: (
            not _apart(uses, leaders_only[found.first[one]], leaders_only[found.second[one]]),
            float(found.distances[one]),
        ),
    )
    for one in order:
        first, second = leaders_only[int(found.first[one])], leaders_only[int(found.second[one])]
        if _as_long(records[first], records[second]):
            connect(first, second, "nearly", float(found.distances[one]))
    pairs.sort(key=lambda pair: (not pair.leak, not pair.conflict, pair.distance))
    return Duplicates(pairs, _leaking(forest, uses, len(records)), found.complete)


def _as_long(first: Record, second: Record) -> bool:
    """Within 2 % or 0.1 s: pictures at equal parts of other durations show other moments."""
    if first.seconds is None or second.seconds is None:
        return first.seconds is second.seconds
    return abs(first.seconds - second.seconds) <= max(0.1, 0.02 * max(first.seconds, second.seconds))


def _first_split(uses: Uses, source: int) -> int:
    bits = int(uses.splits[source])
    return (bits & -bits).bit_length() if bits else len(SPLITS) + 1


def _apart(uses: Uses, first: int, second: int) -> bool:
    """In different splits, at least partly."""
    both = int(uses.splits[first] | uses.splits[second])
    return both & (both - 1) != 0


def _leaking(forest: "_Forest", uses: Uses, count: int) -> int:
    roots = [forest.root(source) for source in range(count)]
    members = Counter(roots)
    trained = {root for source, root in enumerate(roots) if uses.splits[source] & 1}
    return sum(
        members[root] > 1 and root in trained and not int(uses.splits[source]) & 1 for source, root in enumerate(roots)
    )


def _unpacked(texts: list[str]) -> NDArray[np.uint8]:
    raw = b"".join(base64.b64decode(text) for text in texts)
    return np.frombuffer(raw, np.uint8).reshape(len(texts), SIGNATURE_BYTES)


class _Forest:
    """Which sources are connected."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def root(self, one: int) -> int:
        while self._above[one] != one:
            self._above[one] = self._above[self._above[one]]
            one = self._above[one]
        return one

    def join(self, first: int, second: int) -> bool:
        """True where they were not connected before."""
        a, b = self.root(first), self.root(second)
        self._above[b] = a
        return a != b


def findings_of(duplicates: Duplicates, uses: Uses) -> list[Finding]:
    """A finding for each pair: bad where it is a leak or a conflict."""
    findings = []
    for pair in duplicates.pairs:
        first, second = pair.first, pair.second
        kind = "leak" if pair.leak else "conflict" if pair.conflict else "repeat"
        what = f"is {_SAID[pair.same]} {uses.sources[first]}"
        if pair.leak:
            what += f", in {uses.split(second)} here and in {uses.split(first)} there"
        if pair.conflict:
            what += f"; its label is {uses.label(second)!r} here and {uses.label(first)!r} there"
        findings.append(Finding(kind, uses.sources[second], what, bad=pair.leak or pair.conflict))
    if not duplicates.complete:
        what = f"more than {MOST_PAIRS:,} pairs look alike; near-duplicates are left out"
        findings.append(Finding("not searched", "the data set", what, bad=False))
    return findings


def write_pairs(path: Path, pairs: Iterable[Pair], uses: Uses) -> None:
    """Write the pairs as CSV."""
    with whole_text(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        sides = [f"{name}_{what}" for name in ("first", "second") for what in ("source", "split", "label")]
        writer.writerow(["finding", "same", "distance", *sides])
        for pair in pairs:
            kinds = [name for name, so in (("leak", pair.leak), ("conflict", pair.conflict)) if so] or ["repeat"]
            row = ["+".join(kinds), pair.same, f"{pair.distance:.4f}"]
            for one in (pair.first, pair.second):
                row += [uses.sources[one], uses.split(one), uses.label(one)]
            writer.writerow(row)
