"""All that is wrong with a manifest at once, each with its line; `read_manifest` stops at the first.

`read_manifest` stays the judge: rows that this file objects to are left out, and what it still refuses in the rest is
taken from its own words, row by row.
"""

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from videogru.config import SPLITS
from videogru.data.manifests.manifest import Manifest, read_manifest
from videogru.data_check.results import Finding
from videogru.errors import DataError
from videogru.settings import nearest

MOST_REFUSALS = 100  # of read_manifest, one reading each
_RARE = 0.1  # of the rows of the label it looks like
_SHORT, _LONG = 4, 8  # letters from which one, two changes count as a typing mistake


def rows_with_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and rows of a CSV with the line each ends on; bytes that are no UTF-8 become lone surrogates."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, [cell.strip() for cell in cells]
        except csv.Error as error:
            raise DataError(f"not CSV: {error}", where=f"{path}:{reader.line_num}") from error


def manifest_problems(path: Path, classes: Sequence[str] | None, root: Path, good: Path) -> list[Finding]:
    """What is wrong with the rows of a manifest; the others are written to `good`, a manifest for the same root.

    classes: the known ones, or None for any. Raises DataError where no row is left, or the header is no good.
    """
    lines = rows_with_lines(path)
    _, header = next(lines, (0, []))
    if not {"source", "label"} <= set(header) or len(set(header)) != len(header):
        read_manifest(path, classes, root=root)  # says what is wrong
        raise DataError("the header is no good", where=path)
    findings: list[Finding] = []
    kept: list[tuple[int, list[str]]] = []
    first_use: dict[str, tuple[str, int]] = {}
    known = None if classes is None else frozenset(classes)
    for line, cells in lines:
        problem = _row_problem(header, cells, known)
        if problem is None:
            row = dict(zip(header, cells, strict=True))
            group, split = row.get("group") or row["source"], row.get("split", "")
            before = first_use.setdefault(group, (split, line)) if split else (split, line)
            if before[0] != split:
                said = f"group {group!r} is in {split} here but in {before[0]} on line {before[1]}"
                problem = ("group in two splits", said)
        if problem is None:
            kept.append((line, cells))
        else:
            findings.append(Finding(problem[0], f"{path}:{line}", problem[1]))
    return findings + _refusals(path, header, kept, root, good)


def _row_problem(header: list[str], cells: list[str], classes: frozenset[str] | None) -> tuple[str, str] | None:
    """(kind, what) of the first thing that is wrong with a row by itself."""
    if len(cells) != len(header):
        return "row", f"{len(cells)} cells, but the header has {len(header)}"
    row = dict(zip(header, cells, strict=True))
    if any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
        return "row", "not UTF-8"
    if not row["source"]:
        return "row", "no source"
    if not row["label"]:
        return "row", f"no label for {row['source']}"
    if classes is not None and row["label"] not in classes:
        hint = nearest(row["label"], classes)
        return "label", f"unknown label {row['label']!r}" + (f". {hint}" if hint else "")
    if row.get("split", "") not in ("", *SPLITS):
        return "row", f"unknown split {row['split']!r}"
    ends = [row.get("start_seconds", ""), row.get("end_seconds", "")]
    if ends == ["", ""]:
        return None
    if "" in ends:
        return "window", "only one of start_seconds and end_seconds is given"
    start, end = map(_number, ends)
    if not (0 <= start < math.inf and 0 <= end < math.inf):
        return "window", f"{ends[0]!r} to {ends[1]!r} are no numbers of seconds from 0 on"
    return None if start < end else ("window", f"start_seconds {ends[0]} is not before end_seconds {ends[1]}")


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _refusals(
    path: Path, header: list[str], kept: list[tuple[int, list[str]]], root: Path, good: Path
) -> list[Finding]:
    """Leave out what read_manifest refuses, one row after the other; write the rest to `good`."""
    findings: list[Finding] = []
    while True:
        if not kept:
            raise DataError("not one row is usable", where=path, hint="\n  ".join(one.what for one in findings[:3]))
        with good.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            # On one line each, so that a line number names a row.
            starts = {}
            for place, (_, cells) in enumerate(kept):
                writer.writerow(cells)
                starts[place] = sum(cell.count("\n") for cell in cells)
        try:
            read_manifest(good, root=root)
        except DataError as error:
            at = re.fullmatch(re.escape(str(good)) + r":(\d+)", error.where or "")
            if at is None:
                raise
            place = _row_on_line(starts, int(at[1]))
            findings.append(Finding("row", f"{path}:{kept[place][0]}", error.what))
            del kept[place]
            if len(findings) >= MOST_REFUSALS:
                raise DataError(
                    f"more than {MOST_REFUSALS} rows cannot be used, such as the one on this line: {error.what}",
                    where=findings[0].where,
                    hint=error.hint,
                ) from error
        else:
            return findings


def _row_on_line(extra: dict[int, int], line: int) -> int:
    """The row that ends on a line; extra: line breaks inside of each row. The header is line 1."""
    ends = np.cumsum([1 + extra[place] for place in range(len(extra))]) + 1
    return int(np.searchsorted(ends, line))


def label_typos(labels: Sequence[str], lines: Sequence[int] | None, where: str) -> list[Finding]:
    """Rare labels that look like a frequent one: by case, blanks and hyphens, or by a slip of the finger.

    labels: of each row; lines: of each row, or None where there are none to name. Labels that differ in case or blanks
    without one being rare are warnings.
    """
    counts = Counter(labels)
    forms: dict[str, list[str]] = defaultdict(list)
    for label in counts:
        forms[re.sub(r"[\s_-]", "", label).casefold()].append(label)
    frequent = sorted(counts, key=lambda label: -counts[label])
    findings = []
    for label in sorted(counts):
        same = max(forms[re.sub(r"[\s_-]", "", label).casefold()], key=lambda one: counts[one])
        other = same if same != label else _slip_of(label, frequent, counts)
        if other is None:
            continue
        places = [] if lines is None else [line for line, one in zip(lines, labels, strict=True) if one == label]
        more = f" (and {len(places) - 1} more lines)" if len(places) > 1 else ""
        at = f"{where}:{places[0]}" if places else where
        what = f"label {label!r} ({_rows(counts[label])}) looks like {other!r} ({_rows(counts[other])}){more}"
        findings.append(Finding("label typo", at, what, bad=_is_rare(counts[label], counts[other])))
    return findings


def _is_rare(count: int, other: int) -> bool:
    return count <= max(1, _RARE * other) and other >= 3 * count


def _slip_of(label: str, frequent: list[str], counts: Counter[str]) -> str | None:
    """The frequent label that a slip of the finger makes this rare one of."""
    for other in frequent:
        if not _is_rare(counts[label], counts[other]):
            return None
        shorter = min(len(label), len(other))
        allowed = 2 if shorter >= _LONG else 1 if shorter >= _SHORT else 0
        # "take 1" and "take 2" are no slips.
        if re.sub(r"\d", "", label) != re.sub(r"\d", "", other) and edits(label, other, allowed) <= allowed:
            return other
    return None


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def edits(first: str, second: str, most: int) -> int:
    """Insertions, deletions, changes and swaps of neighbors from one word to the other; most + 1 for more.

    Optimal string alignment, the distance of Damerau (1964) with each letter edited once.
    """
    if abs(len(first) - len(second)) > most:
        return most + 1
    before: list[int] = []
    above = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        row = [i]
        for j, b in enumerate(second, start=1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and b == first[i - 2]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, above = above, row
    return min(above[-1], most + 1)


def class_problems(manifest: Manifest, *, folders: bool) -> list[Finding]:
    """Classes without rows, and classes that a split has but train has not; folders: a class is a folder."""
    counts = np.zeros((len(manifest.classes), len(SPLITS) + 1), np.int64)
    labeled = manifest.labels >= 0
    np.add.at(counts, (manifest.labels[labeled], manifest.splits[labeled]), 1)
    findings = []
    for name, of_split in zip(manifest.classes, counts.tolist(), strict=True):
        if not sum(of_split):
            what = "has no files: training refuses an empty folder" if folders else "has no rows"
            findings.append(Finding("empty class", name, what, bad=folders))
        elif not of_split[0] and any(of_split[1 : len(SPLITS)]) and counts[:, 0].any():
            findings.append(Finding("empty class", name, "has rows to test on, but none to train on", bad=False))
    return findings


def group_problems(manifest: Manifest) -> list[Finding]:
    """Groups with rows in two splits."""
    names, codes = manifest.groups.names, manifest.groups.codes
    bits = np.zeros(len(names), np.int64)
    set_ = manifest.splits >= 0
    np.bitwise_or.at(bits, codes[set_], 1 << manifest.splits[set_].astype(np.int64))
    findings = []
    for group in np.flatnonzero(bits & (bits - 1)).tolist():
        inside = " and ".join(name for code, name in enumerate(SPLITS) if bits[group] >> code & 1)
        findings.append(Finding("group in two splits", names[group], f"group {names[group]!r} is in {inside}"))
    return findings
