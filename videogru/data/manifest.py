"""The table of a data set: one row per source or part of a source, as NumPy columns.

Columns, not lists of records: millions of Python objects would be copied into each worker as their counts change.
"""

import csv
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from videogru.config import SPLITS, Split, nearest
from videogru.errors import DataError

Strings = NDArray[np.character]  # fixed-width str; the abstract type, as np.str_ would mean width 0 to beartype
UNSET = -1
_REQUIRED = ("source", "label")
_OPTIONAL = ("split", "group", "start_seconds", "end_seconds")
_FORMAT_HINT = "A manifest is a UTF-8 CSV with the columns source,label[,split,group,start_seconds,end_seconds]."


@dataclass(frozen=True, eq=False)
class Manifest:
    """Rows as columns of equal length; `sources` are POSIX paths relative to `root`.

    sources, groups: (N,) str; labels: (N,) int64, index into `classes` or -1 where unknown; splits: (N,) int8, index
    into config.SPLITS or -1 where unset; start_seconds, end_seconds: (N,) float64, both NaN for a whole source;
    notes: what a reader of the data set should know. Raises ValueError where the columns do not fit together.
    """

    root: Path
    classes: tuple[str, ...]
    sources: Strings
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    groups: Strings
    start_seconds: NDArray[np.float64]
    end_seconds: NDArray[np.float64]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.sources, self.labels, self.splits, self.groups, self.start_seconds, self.end_seconds)
        if len({column.shape for column in columns}) != 1 or self.sources.ndim != 1:
            raise ValueError(f"columns differ in shape: {[column.shape for column in columns]}")
        for name, codes, count in (("labels", self.labels, len(self.classes)), ("splits", self.splits, len(SPLITS))):
            if len(codes) and not -1 <= int(codes.min()) <= int(codes.max()) < count:
                raise ValueError(f"{name} must lie in -1..{count - 1}")

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        counts = " ".join(f"{split}={len(self.rows(split))}" for split in SPLITS)
        return f"Manifest({len(self)} rows, {len(self.classes)} classes, {counts}, root={self.root})"

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Indices of the rows of one split, increasing."""
        return np.flatnonzero(self.splits == SPLITS.index(split)).astype(np.int64)

    def path(self, row: int) -> Path:
        """Where the source of a row lies."""
        return self.root / str(self.sources[row])

    def window(self, row: int) -> tuple[float, float] | None:
        """(start, end) in seconds on the source's own time line, or None for the whole source."""
        start, end = float(self.start_seconds[row]), float(self.end_seconds[row])
        return None if math.isnan(start) else (start, end)

    def take(self, indices: NDArray[np.integer]) -> "Manifest":
        """The rows at `indices`, in their order."""
        return replace(
            self,
            sources=self.sources[indices],
            labels=self.labels[indices],
            splits=self.splits[indices],
            groups=self.groups[indices],
            start_seconds=self.start_seconds[indices],
            end_seconds=self.end_seconds[indices],
        )

    def to_csv(self, path: Path) -> None:
        """Write what `read_manifest` takes back, whole or not at all; columns without any value are left out.

        Sources stay relative to `root`, so the file belongs into that folder. Unknown labels and unset splits become
        empty cells. Raises DataError where the file cannot be written.
        """
        columns: dict[str, list[str]] = {
            "source": self.sources.tolist(),
            "label": [self.classes[label] if label >= 0 else "" for label in self.labels.tolist()],
        }
        if (self.splits != UNSET).any():
            columns["split"] = [SPLITS[split] if split >= 0 else "" for split in self.splits.tolist()]
        if not np.array_equal(self.groups, self.sources):
            columns["group"] = self.groups.tolist()
        if not np.isnan(self.start_seconds).all():
            for name, seconds in (("start_seconds", self.start_seconds), ("end_seconds", self.end_seconds)):
                columns[name] = ["" if math.isnan(value) else repr(value) for value in seconds.tolist()]
        part = path.with_name(path.name + ".part")
        try:
            with part.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
            part.replace(path)
        except UnicodeEncodeError as error:
            raise DataError(f"a file name is no valid text: {error.object!r}", where=path, hint="Rename it.") from error
        except OSError as error:
            raise DataError(f"the manifest cannot be written: {error}", where=path) from error


def build_manifest(
    root: Path,
    classes: Sequence[str],
    sources: Sequence[str] | Strings,
    labels: Sequence[int] | NDArray[np.integer],
    splits: Sequence[int] | NDArray[np.integer] | None = None,
    notes: tuple[str, ...] = (),
) -> Manifest:
    """A manifest of whole sources, each its own group; splits None: all unset."""
    count = len(sources)
    column = np.asarray(sources, dtype=np.str_)
    return Manifest(
        root=root,
        classes=tuple(classes),
        sources=column,
        labels=np.asarray(labels, dtype=np.int64),
        splits=np.full(count, UNSET, np.int8) if splits is None else np.asarray(splits, dtype=np.int8),
        groups=column,
        start_seconds=np.full(count, np.nan),
        end_seconds=np.full(count, np.nan),
        notes=notes,
    )


def read_manifest(path: Path, classes: Sequence[str] | None = None, *, root: Path | None = None) -> Manifest:
    """Read a CSV with the columns source,label[,split,group,start_seconds,end_seconds]; other columns are ignored.

    Sources are relative to `root` (default: the manifest's folder) and may not leave it, links included. Classes are
    the sorted labels unless given. An empty split cell is unset; an empty or absent group is the source itself; both
    window cells are given or none. Raises DataError naming the line for whatever does not fit.
    """
    root = (path.parent if root is None else root).resolve()
    header, rows, lines = read_table(path)
    for name in _REQUIRED:
        if name not in header:
            raise DataError(f"no column {name!r}, found {', '.join(header)}", where=path, hint=_FORMAT_HINT)
    for name in (*_REQUIRED, *_OPTIONAL):
        if header.count(name) > 1:
            raise DataError(f"two columns {name!r}", where=path, hint=_FORMAT_HINT)

    def column(name: str) -> list[str]:
        if name not in header:
            return [""] * len(rows)
        at = header.index(name)
        return [row[at].strip() for row in rows]

    def fail(row: int, what: str, hint: str | None = None) -> DataError:
        return DataError(what, where=f"{path}:{lines[row]}", hint=hint)

    sources, words = column("source"), column("label")
    for row, (source, word) in enumerate(zip(sources, words, strict=True)):
        if not source:
            raise fail(row, "no source")
        if not word:
            raise fail(
                row, f"no label for {source}", "Every row needs one; to predict without labels use `videogru infer`."
            )
    _refuse_strays(root, sources, fail)

    names = tuple(sorted(set(words)) if classes is None else classes)
    codes = {name: code for code, name in enumerate(names)}
    labels = np.empty(len(rows), np.int64)
    for row, word in enumerate(words):
        if word not in codes:
            raise fail(row, f"unknown label {word!r}", nearest(word, names) or f"Classes: {', '.join(names[:20])}")
        labels[row] = codes[word]

    split_codes: dict[str, int] = {"": UNSET} | {split: code for code, split in enumerate(SPLITS)}
    splits = np.empty(len(rows), np.int8)
    for row, word in enumerate(column("split")):
        if word not in split_codes:
            raise fail(row, f"unknown split {word!r}", f"Splits: {', '.join(SPLITS)}, or empty to have one chosen.")
        splits[row] = split_codes[word]

    groups = [group or source for group, source in zip(column("group"), sources, strict=True)]
    first_row: dict[str, int] = {}
    for row, (group, split) in enumerate(zip(groups, splits.tolist(), strict=True)):
        if split != UNSET and splits[before := first_row.setdefault(group, row)] != split:
            here, there = SPLITS[split], SPLITS[int(splits[before])]
            what = f"group {group!r} is in {here} here but in {there} on line {lines[before]}"
            raise fail(row, what, "One group (video, patient, speaker) belongs to one split, or the test is no test.")

    starts = _seconds("start_seconds", column("start_seconds"), fail)
    ends = _seconds("end_seconds", column("end_seconds"), fail)
    for row in np.flatnonzero(np.isnan(starts) != np.isnan(ends)).tolist():
        raise fail(
            row, "only one of start_seconds and end_seconds is given", "Give both, or none for the whole source."
        )
    for row in np.flatnonzero(starts >= ends).tolist():
        raise fail(row, f"start_seconds {starts[row]:g} is not before end_seconds {ends[row]:g}")
    return Manifest(root, names, np.asarray(sources), labels, splits, np.asarray(groups), starts, ends)


def read_table(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows of as many cells, and the line each row ends on; blank lines are skipped."""
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    what = f"{len(cells)} cells, but the header has {len(header)}"
                    raise DataError(what, where=f"{path}:{reader.line_num}", hint="Quote cells that contain a comma.")
                rows.append(cells)
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", where=path, hint="Save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=path, hint=_FORMAT_HINT) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    if not header:
        raise DataError("the manifest is empty", where=path, hint=_FORMAT_HINT)
    if not rows:
        raise DataError("the manifest has a header but no rows", where=path)
    return header, rows, lines


def _seconds(name: str, cells: list[str], fail: Callable[..., DataError]) -> NDArray[np.float64]:
    values = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        if not cell:
            continue
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise fail(row, f"{name} must be a number of seconds from 0 on, got {cell!r}")
        values[row] = value
    return values


def _refuse_strays(root: Path, sources: list[str], fail: Callable[..., DataError]) -> None:
    """Raise for the first source outside of `root`, by its name or through a link.

    Each folder is listed once: a million calls of Path.resolve would take minutes.
    """
    hint = "Sources are relative to the manifest's folder, or to --data-dir, and may not leave it."
    inside: dict[str, set[str]] = {}
    for row, source in enumerate(sources):
        folder, _, name = source.rpartition("/")
        if source[0] in "/\\" or ":" in source or ".." in source or "\0" in source:
            windows = PureWindowsPath(source)
            if source[0] in "/\\" or windows.drive or ".." in windows.parts or "\0" in source:
                raise fail(row, f"source {source!r} is outside of {root}", hint)
        if folder not in inside:
            place = root / folder
            if not place.resolve().is_relative_to(root):
                raise fail(row, f"source {source!r} is outside of {root}: a folder on its way is a link", hint)
            inside[folder] = _stray_links(place, root)
        if name in inside[folder]:
            raise fail(row, f"source {source!r} is a link to a place outside of {root}", hint)


def _stray_links(folder: Path, root: Path) -> set[str]:
    """Names in `folder` that are links to places outside of `root`; an absent folder has none."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        links = [entry.name for entry in entries if entry.is_symlink()]
    return {name for name in links if not (folder / name).resolve().is_relative_to(root)}


def missing_rows(manifest: Manifest) -> NDArray[np.int64]:
    """Rows whose file is absent; each folder is listed once."""
    present: dict[str, set[str]] = {}
    missing: list[int] = []
    for row, source in enumerate(manifest.sources.tolist()):
        folder, _, name = source.rpartition("/")
        if folder not in present:
            place = manifest.root / folder
            present[folder] = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
        if name not in present[folder]:
            missing.append(row)
    return np.asarray(missing, np.int64)


def assign_splits(manifest: Manifest, *, val_fraction: float, test_fraction: float, seed: int) -> Manifest:
    """Give every row a split; what is set stays, except that train lends to a val split that nobody named.

    Groups stay whole. The unset groups (or, where all are set but none is val, the groups of train) are shuffled by
    `seed` and dealt out within each label (a group's most frequent one) by the largest remainders of
    train : val : test. Of a label with n groups the first goes to train, the second to val and the third to test
    before the shares count; labels that a split lacks are named in `notes`. A fraction counts for nothing
    where its split is already named. The result depends on the set of groups, not on the order of rows.

    Raises DataError for fewer than two classes, for no training row, and for a training row without label.
    """
    if len(manifest.classes) < 2:
        what = f"{len(manifest.classes)} class ({', '.join(manifest.classes)}), at least 2 are needed"
        raise DataError(what, where=manifest.root)
    splits = manifest.splits.astype(np.int64)
    groups = np.unique(manifest.groups, return_inverse=True)[1]
    count = int(groups.max(initial=-1)) + 1
    # Unset rows of a group that has a split follow it.
    group_split = np.full(count, UNSET, np.int64)
    np.maximum.at(group_split, groups, splits)
    named = set(np.unique(splits).tolist())
    train, val, test = range(len(SPLITS))
    shares = np.array([0.0, 0.0 if val in named else val_fraction, 0.0 if test in named else test_fraction])
    free = UNSET if (group_split == UNSET).any() else train
    pool = np.flatnonzero(group_split == free)
    # A published table may have a group in two splits; such rows stay where they are.
    movable = (splits == UNSET) | ((splits == free) & (group_split == free)[groups])
    if free == train:
        shares[test] = 0.0
    shares[train] = 1.0 - shares.sum()
    if shares[train] <= 0:
        raise DataError(f"val_fraction {val_fraction:g} and test_fraction {test_fraction:g} leave nothing to train on")
    dealt = False
    if len(pool) and (free == UNSET or shares[val] > 0):
        strata = _majority_labels(groups, manifest.labels, count)[pool]
        group_split[pool] = _deal(strata, shares, np.random.default_rng(seed).permutation(len(pool)))
        dealt = True
    assigned = np.where(movable, group_split[groups], splits).astype(np.int8)
    notes = _absent_classes(manifest, assigned, shares) if dealt else []
    training = manifest.labels[assigned == train]
    if not len(training):
        raise DataError(
            "no training row", where=manifest.root, hint="Set the split of some rows to train, or leave it empty."
        )
    if (training < 0).any():
        raise DataError(f"{int((training < 0).sum())} training rows have no label", where=manifest.root)
    return replace(manifest, splits=assigned, notes=(*manifest.notes, *notes))


def _majority_labels(groups: NDArray[np.int64], labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(count,) the most frequent label of each group, the smaller one of equals."""
    span = int(labels.max(initial=0)) + 2
    pairs, rows = np.unique(groups * span + labels + 1, return_counts=True)
    order = np.lexsort((-pairs, rows))  # most rows last, so that they are written last
    majority = np.empty(count, np.int64)
    majority[pairs[order] // span] = pairs[order] % span - 1
    return majority


def _deal(strata: NDArray[np.int64], shares: NDArray[np.float64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """(G,) split code of each group: within its stratum, in the order of `keys`, by largest remainder."""
    order = np.lexsort((keys, strata))
    dealt: list[NDArray[np.int64]] = []
    wanted = np.flatnonzero(shares > 0)
    for size in np.unique(strata, return_counts=True)[1].tolist():
        counts = np.floor(size * shares + 1e-9).astype(np.int64)
        remainders = size * shares - counts
        for split in np.argsort(-remainders, kind="stable")[: size - int(counts.sum())].tolist():
            counts[split] += 1
        for split in wanted[:size].tolist():
            if counts[split] == 0:
                counts[int(counts.argmax())] -= 1
                counts[split] = 1
        dealt.append(np.repeat(np.arange(len(shares)), counts))
    codes = np.empty(len(strata), np.int64)
    codes[order] = np.concatenate(dealt)
    return codes


def _absent_classes(manifest: Manifest, splits: NDArray[np.int8], shares: NDArray[np.float64]) -> list[str]:
    """Which classes have rows, but none in a split that was dealt."""
    labeled = manifest.labels >= 0
    place = manifest.labels[labeled] * len(SPLITS) + splits[labeled]
    counts = np.bincount(place, minlength=len(manifest.classes) * len(SPLITS)).reshape(-1, len(SPLITS))
    notes = []
    for code in np.flatnonzero(shares > 0).tolist():
        names = [manifest.classes[label] for label in np.flatnonzero((counts[:, code] == 0) & (counts.sum(axis=1) > 0))]
        if names:
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            notes.append(f"no rows in the {SPLITS[code]} split, for want of groups: {shown}")
    return notes
