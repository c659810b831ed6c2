"""The table of a data set: one row per source or part of a source, as columns.

Columns, not lists of records: millions of Python objects would be copied into each worker as their counts change.
"""

import csv
import math
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from videogru.config import SPLITS, Split
from videogru.data.manifests.columns import CHUNK_ROWS, Coded, Text, hand_over
from videogru.data.manifests.file_tree import Tree, absent, places_of
from videogru.data.manifests.table import FORMAT_HINT, Table, read_columns
from videogru.errors import DataError
from videogru.settings import nearest

Strings = NDArray[np.character]  # fixed-width str; the abstract type, as np.str_ would mean width 0 to beartype
UNSET = -1
_REQUIRED = ("source", "label")
_OPTIONAL = ("split", "group", "start_seconds", "end_seconds")


@dataclass(frozen=True, eq=False)
class Manifest:
    """Rows as columns of equal length; `sources` are POSIX paths relative to `root`.

    sources: (N,) texts; groups: (N,) texts of which many are equal (`Text.of` and `Coded.of` make them from any
    strings); labels: (N,) int64, index into `classes` or -1 where unknown; splits: (N,) int8, index into config.SPLITS
    or -1 where unset; start_seconds, end_seconds: (N,) float64, both NaN for a whole source; notes: what a reader of
    the data set should know. Raises ValueError where the columns do not fit together.
    """

    root: Path
    classes: tuple[str, ...]
    sources: Text
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    groups: Coded
    start_seconds: NDArray[np.float64]
    end_seconds: NDArray[np.float64]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.sources, self.labels, self.splits, self.groups, self.start_seconds, self.end_seconds)
        if len({column.shape for column in columns}) != 1 or self.labels.ndim != 1:
            raise ValueError(f"columns differ in shape: {[column.shape for column in columns]}")
        for name, codes, count in (("labels", self.labels, len(self.classes)), ("splits", self.splits, len(SPLITS))):
            if len(codes) and not -1 <= int(codes.min()) <= int(codes.max()) < count:
                raise ValueError(f"{name} must lie in -1..{count - 1}")

    def __len__(self) -> int:
        return len(self.sources)

    def __getstate__(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: hand_over(value) if isinstance(value, np.ndarray) else value for name, value in values.items()}

    def __repr__(self) -> str:
        counts = " ".join(f"{split}={len(self.rows(split))}" for split in SPLITS)
        return f"Manifest({len(self)} rows, {len(self.classes)} classes, {counts}, root={self.root})"

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Indices of the rows of one split, increasing."""
        return np.flatnonzero(self.splits == SPLITS.index(split)).astype(np.int64)

    def path(self, row: int) -> Path:
        """Where the source of a row lies."""
        return self.root / self.sources[row]

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
        names = ["source", "label"]
        names += ["split"] if (self.splits != UNSET).any() else []
        names += ["group"] if not self.groups.is_column(self.sources) else []
        names += ["start_seconds", "end_seconds"] if not np.isnan(self.start_seconds).all() else []
        part = path.with_name(path.name + ".part")
        try:
            with part.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(names)
                for start in range(0, len(self), CHUNK_ROWS):
                    columns = self._cells(np.s_[start : start + CHUNK_ROWS])
                    writer.writerows(zip(*(columns[name]() for name in names), strict=True))
            part.replace(path)
        except UnicodeEncodeError as error:
            raise DataError(f"a file name is no valid text: {error.object!r}", where=path, hint="Rename it.") from error
        except OSError as error:
            raise DataError(f"the manifest cannot be written: {error}", where=path) from error

    def _cells(self, rows: slice) -> dict[str, Callable[[], list[str]]]:
        def seconds(values: NDArray[np.float64]) -> list[str]:
            return ["" if math.isnan(value) else repr(value) for value in values[rows].tolist()]

        return {
            "source": lambda: self.sources[rows].tolist(),
            "label": lambda: [self.classes[label] if label >= 0 else "" for label in self.labels[rows].tolist()],
            "split": lambda: [SPLITS[split] if split >= 0 else "" for split in self.splits[rows].tolist()],
            "group": lambda: self.groups[rows].tolist(),
            "start_seconds": lambda: seconds(self.start_seconds),
            "end_seconds": lambda: seconds(self.end_seconds),
        }


def build_manifest(
    root: Path,
    classes: Sequence[str],
    sources: Sequence[str] | Strings | Text,
    labels: Sequence[int] | NDArray[np.integer],
    splits: Sequence[int] | NDArray[np.integer] | None = None,
    notes: tuple[str, ...] = (),
) -> Manifest:
    """A manifest of whole sources, each its own group; splits None: all unset."""
    count = len(sources)
    column = Text.of(sources)
    return Manifest(
        root=root,
        classes=tuple(classes),
        sources=column,
        labels=np.asarray(labels, dtype=np.int64),
        splits=np.full(count, UNSET, np.int8) if splits is None else np.asarray(splits, dtype=np.int8),
        groups=Coded.of(column),
        start_seconds=np.full(count, np.nan),
        end_seconds=np.full(count, np.nan),
        notes=notes,
    )


def read_manifest(path: Path, classes: Sequence[str] | None = None, *, root: Path | None = None) -> Manifest:
    """Read a table with the columns source,label[,split,group,start_seconds,end_seconds]; others are ignored.

    path: a CSV, or the same columns in a .parquet or .arrow file. Sources are relative to `root` (default: the
    manifest's folder) and may not leave it, links included. Classes are the sorted labels unless given. An empty split
    cell is unset; an empty or absent group is the source itself; both window cells are given or none. Raises DataError
    naming the line for whatever does not fit.
    """
    root = (path.parent if root is None else root).resolve()
    table = read_columns(path, (*_REQUIRED, *_OPTIONAL))
    for name in _REQUIRED:
        if name not in table:
            raise DataError(f"no column {name!r}, found {', '.join(table.header)}", where=path, hint=FORMAT_HINT)

    def fail(row: int, what: str, hint: str | None = None) -> DataError:
        return DataError(what, where=table.where(row), hint=hint)

    table.columns["source"] = _plain(table.text("source"))
    sources = Text.of_arrow(table.text("source"))
    empty = np.diff(sources.offsets) == 0
    labels, words = _coded(table, "label")
    blank = labels == words.index("") if "" in words else np.zeros(len(labels), bool)
    for row in np.flatnonzero(empty | blank)[:1].tolist():
        if empty[row]:
            raise fail(row, "no source")
        hint = "Every row needs one; to predict without labels use `videogru infer`."
        raise fail(row, f"no label for {sources[row]}", hint)
    _refuse_strays(root, sources, fail)

    names = tuple(sorted(words) if classes is None else classes)
    codes = {name: code for code, name in enumerate(names)}
    labels = np.array([codes.get(word, UNSET) for word in words], np.int64)[labels]
    for row in np.flatnonzero(labels == UNSET)[:1].tolist():
        word = table.text("label")[row].as_py()
        raise fail(row, f"unknown label {word!r}", nearest(word, names) or f"Classes: {', '.join(names[:20])}")

    split_codes: dict[str, int] = {"": UNSET} | {split: code for code, split in enumerate(SPLITS)}
    splits, words = _coded(table, "split")
    splits = np.array([split_codes.get(word, UNSET - 1) for word in words], np.int8)[splits]
    for row in np.flatnonzero(splits < UNSET)[:1].tolist():
        hint = f"Splits: {', '.join(SPLITS)}, or empty to have one chosen."
        raise fail(row, f"unknown split {table.text('split')[row].as_py()!r}", hint)

    groups = _groups(table, sources)
    _refuse_shared_groups(groups, splits, table)
    bounds = []
    for name in ("start_seconds", "end_seconds"):
        values, wrong = table.seconds(name)
        if wrong >= 0:
            cell = table.text(name)[wrong].as_py()
            raise fail(wrong, f"{name} must be a number of seconds from 0 on, got {cell!r}")
        bounds.append(values)
    starts, ends = bounds
    for row in np.flatnonzero(np.isnan(starts) != np.isnan(ends))[:1].tolist():
        hint = "Give both, or none for the whole source."
        raise fail(row, "only one of start_seconds and end_seconds is given", hint)
    for row in np.flatnonzero(starts >= ends)[:1].tolist():
        raise fail(row, f"start_seconds {starts[row]:g} is not before end_seconds {ends[row]:g}")
    return Manifest(root, names, sources, labels, splits, groups, starts, ends)


def _plain(sources: Any) -> Any:
    """Sources without `./`, `//` and a slash at the end: one file has one name, by which rows are grouped."""
    odd = pc.match_substring_regex(sources, r"//|(^|/)\.(/|$)|/$")
    if not pc.any(odd).as_py():
        return sources
    pairs = zip(sources.to_pylist(), odd.to_pylist(), strict=True)
    plain = [posixpath.normpath(text) if is_odd else text for text, is_odd in pairs]
    return pa.chunked_array([pa.array(plain, pa.large_string())])


def _coded(table: Table, name: str) -> tuple[NDArray[Any], list[str]]:
    """(N,) codes into the different cells of a column, which are [''] where it is absent."""
    if name not in table:
        return np.zeros(table.rows, np.int32), [""]
    encoded = table.text(name).dictionary_encode().combine_chunks()
    return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()


def _groups(table: Table, sources: Text) -> Coded:
    if "group" not in table:
        return Coded.of(sources)
    cells = table.text("group")
    own = pc.equal(cells, "")
    if not pc.any(own).as_py():
        encoded = cells.dictionary_encode().combine_chunks()
        codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32)
        return Coded(codes, Text.of_arrow(encoded.dictionary))
    return Coded.of(Text.of_arrow(pc.if_else(own, table.text("source"), cells)))


def _refuse_shared_groups(groups: Coded, splits: NDArray[np.int8], table: Table) -> None:
    """Raise for the first row whose group an earlier row has put into another split."""
    rows = np.flatnonzero(splits != UNSET)
    codes = groups.codes[rows]
    first = np.zeros(len(groups.names), np.int64)
    first[codes[::-1]] = rows[::-1]
    for row in rows[splits[rows] != splits[first[codes]]][:1].tolist():
        before = int(first[groups.codes[row]])
        line = table.where(before).removeprefix(str(table.path)).lstrip(":").strip()
        place = f"line {line}" if line.isdigit() else line
        here, there = SPLITS[int(splits[row])], SPLITS[int(splits[before])]
        what = f"group {groups[row]!r} is in {here} here but in {there} on {place}"
        hint = "One group (video, patient, speaker) belongs to one split, or the test is no test."
        raise DataError(what, where=table.where(row), hint=hint)


def _refuse_strays(root: Path, sources: Text, fail: Callable[..., DataError]) -> None:
    """Raise for the first source outside of `root`, by its name or through a link.

    Each folder is listed once: a million calls of Path.resolve would take minutes.
    """
    hint = "Sources are relative to the manifest's folder, or to --data-dir, and may not leave it."
    for row in _suspicious(sources):
        source = sources[row]
        windows = PureWindowsPath(source)
        if source[0] in "/\\" or windows.drive or ".." in windows.parts or "\0" in source:
            raise fail(row, f"source {source!r} is outside of {root}", hint)
    tree = Tree(root)
    strays: list[tuple[int, str]] = []
    for folder, rows in places_of(sources).by_folder():
        if tree.leaves(folder):
            strays.append((int(rows[0]), "outside of {}: a folder on its way is a link"))
            continue
        listing = tree.listing(folder)
        if listing is not None and listing.strays:
            others = np.setdiff1d(rows, absent(sources, rows, listing.strays))
            strays += [(int(row), "a link to a place outside of {}") for row in others[:1]]
        if listing is not None and listing.folders:
            strays += _linked_frames(tree, sources, np.setdiff1d(rows, absent(sources, rows, listing.folders)))
    if strays:
        row, what = min(strays)
        raise fail(row, f"source {sources[row]!r} is {what.format(root)}", hint)


def _linked_frames(tree: Tree, sources: Text, rows: NDArray[np.int64]) -> list[tuple[int, str]]:
    """The first of `rows`, which are folders of frames, that holds a link out of the root."""
    looked_into: set[str] = set()
    for row in rows.tolist():
        source = sources[row]
        if source not in looked_into:
            looked_into.add(source)
            frames = tree.listing(source)
            if frames is not None and frames.strays:
                link = min(frames.strays).replace("{", "{{").replace("}", "}}")
                return [(row, f"a folder whose {link} is a link to a place outside of {{}}")]
    return []


def _suspicious(sources: Text) -> list[int]:
    """Rows whose name might lead elsewhere: few, so that each can be looked at."""
    rows: list[int] = []
    for start, chunk in sources.chunks():
        odd = pc.or_(pc.starts_with(chunk, b"/"), pc.starts_with(chunk, b"\\"))
        for mark in (b":", b"..", b"\0"):
            odd = pc.or_(odd, pc.match_substring(chunk, mark))
        rows += (np.flatnonzero(np.asarray(odd)) + start).tolist()
    return rows


def missing_rows(manifest: Manifest) -> NDArray[np.int64]:
    """Rows whose file is absent; each folder is listed once, and none that its parent does not have."""
    tree = Tree(manifest.root)
    missing: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for folder, rows in places_of(manifest.sources).by_folder():
        listing = tree.listing(folder)
        missing.append(rows if listing is None else absent(manifest.sources, rows, listing.names))
    return np.sort(np.concatenate(missing))
