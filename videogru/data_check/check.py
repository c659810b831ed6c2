"""Checks a whole data set: every source decoded, every row compared with it, copies and mistakes in the table found.

A folder of a check holds check.csv, records.jsonl, summary.json (see results.py), and

  problems.csv     everything that was found, one line each
  duplicates.csv   pairs of sources with the same content, duplicates.png shows the nearly same ones
"""

import datetime
import hashlib
import json
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.loading.worker_pool import watched_map
from videogru.data.manifests.corpus import Corpus, open_corpus
from videogru.data.manifests.dataset_card import load_card
from videogru.data_check.contact_sheet import write_contact_sheet
from videogru.data_check.duplicates import Duplicates, Uses, find_duplicates, findings_of, uses_of, write_pairs
from videogru.data_check.inspect import file_facts, inspect_source, packed_signature
from videogru.data_check.manifest_problems import (
    class_problems,
    group_problems,
    label_typos,
    manifest_problems,
    rows_with_lines,
)
from videogru.data_check.perceptual_hash import places, small_gray
from videogru.data_check.results import (
    AGAIN,
    FORMAT,
    HASH_BYTES,
    SUMMARY,
    TABLE,
    Finding,
    Journal,
    Record,
    whole_text,
    write_findings,
    write_table,
)
from videogru.errors import DataError, Interrupted, SourceError
from videogru.resources import card_names

PROBLEMS, DUPLICATES, SHEET = "problems.csv", "duplicates.csv", "duplicates.png"
# A whole file takes longer to read than a clip of it: data.decode_timeout_seconds are for this much of it.
_TIMEOUT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Opened:
    """A data set as far as it can be used, and what is wrong with its table."""

    corpus: Corpus
    findings: list[Finding]


@dataclass(frozen=True)
class Checked:
    """What a check found. name: the data set as it was asked for; decoded: sources that were read now; the others were
    known from before.
    """

    name: str
    folder: Path
    corpus: Corpus
    records: list[Record]
    findings: list[Finding]
    duplicates: Duplicates
    decoded: int

    @property
    def bad(self) -> bool:
        """Anything is bad."""
        return any(finding.bad for finding in self.findings)


def open_for_check(data: DataConfig, *, seed: int) -> Opened:
    """Open a data set although some of its rows are no good; these become findings.

    Raises DataError, ConfigError where nothing of it can be used.
    """
    path = _manifest_path(data)
    findings: list[Finding] = []
    try:
        corpus = _opened(data, seed, findings, data.dataset)
    except DataError:
        if path is None:
            raise
        classes = load_card(data.dataset).classes if data.dataset in card_names() else None
        root = (data.data_dir or path.parent) if classes is None else path.parent
        with tempfile.TemporaryDirectory() as folder:
            good = Path(folder) / "good.csv"
            findings += manifest_problems(path, classes, root.resolve(), good)
            if not findings:
                raise
            named = data.model_copy(update={"dataset": str(good), "data_dir": root})
            corpus = replace(_opened(named, seed, findings, data.dataset), name=data.dataset if classes else path.stem)
    folders = path is None and corpus.card is None
    findings += class_problems(corpus.manifest, folders=folders)
    findings += group_problems(corpus.manifest)
    if corpus.card is None:
        findings += _typos(corpus, path)
    return Opened(corpus, findings)


def _manifest_path(data: DataConfig) -> Path | None:
    if data.dataset in card_names():
        card = load_card(data.dataset)
        return (data.data_dir or card.home) / "manifest.csv" if card.layout == "manifest" else None
    path = Path(data.dataset)
    return path if path.suffix.lower() == ".csv" and path.is_file() else None


def _opened(data: DataConfig, seed: int, findings: list[Finding], name: str) -> Corpus:
    """With the splits that training draws, where it would train on it."""
    try:
        return open_corpus(data, seed=seed, empty_classes=True)
    except DataError as error:
        corpus = open_corpus(data, seed=seed, for_training=False, empty_classes=True)
        findings.append(Finding("training", name, f"training would refuse it: {error.what}"))
        return corpus


def _typos(corpus: Corpus, path: Path | None) -> list[Finding]:
    if path is None:
        labels = [corpus.classes[label] for label in corpus.manifest.labels.tolist() if label >= 0]
        return label_typos(labels, None, str(corpus.manifest.root))
    lines = rows_with_lines(path)
    _, header = next(lines)
    at = header.index("label")
    found = [(line, cells[at]) for line, cells in lines if len(cells) == len(header) and cells[at]]
    return label_typos([label for _, label in found], [line for line, _ in found], str(path))


def check_corpus(
    opened: Opened,
    folder: Path,
    *,
    data: DataConfig,
    num_workers: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read every source of a corpus and leave the results in `folder`; goes on where a check of it was ended.

    data: resolved for the corpus's kind; num_workers: 0 reads here, unwatched; tick: called with the number of
    sources that are done and of all. Raises Interrupted on Ctrl-C, what is done being kept, and DataError where the
    folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder cannot be made: {error.strerror or error}", where=folder) from error
    with closing(Journal(folder, header_of(opened.corpus, data))) as journal:
        return _check(opened, journal, folder, data, num_workers, tick)


def _check(
    opened: Opened,
    journal: Journal,
    folder: Path,
    data: DataConfig,
    num_workers: int,
    tick: Callable[[int, int], None],
) -> Checked:
    corpus = opened.corpus
    names, source_of = _sources(corpus)
    records: dict[str, Record] = {}
    try:
        records = _of_arrays(corpus, tick) if corpus.arrays is not None else _known(corpus, names, journal)
        left = [name for name in names if name not in records]
        tick(len(records), len(names))
        for record in _inspect(left, corpus, data, num_workers):
            journal.add(record)
            records[record.source] = record
            tick(len(records), len(names))
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {len(records)} of {len(names)} sources are checked",
            where=folder,
            hint="The same command goes on from there.",
        ) from None
    ordered = [records[name] for name in names]
    uses = uses_of(corpus.manifest, names, source_of)
    duplicates = find_duplicates(ordered, uses)
    findings = [*findings_of(duplicates, uses), *opened.findings, *_file_findings(ordered)]
    findings += _window_findings(corpus, ordered, source_of) + _row_findings(corpus, source_of, names)
    checked = Checked(data.dataset, folder, corpus, ordered, findings, duplicates, len(left))
    _write(checked, uses, data)
    journal.replace(ordered if corpus.arrays is None else [])
    return checked


def header_of(corpus: Corpus, data: DataConfig) -> dict[str, Any]:
    """What the records of a check depend on, beside the files."""
    read = (
        "decoder",
        "folder_fps",
        "axis",
        "intensity",
        "percentile_low",
        "percentile_high",
        "window_low",
        "window_high",
    )
    settings = data.model_dump(mode="json", include=set(read))
    return {"root": str(corpus.manifest.root), "kind": corpus.kind, "settings": settings}


def _sources(corpus: Corpus) -> tuple[list[str], NDArray[np.int64]]:
    """The different sources in the order of their first row, and the source of each row."""
    codes: dict[str, int] = {}
    source_of = np.fromiter(
        (codes.setdefault(source, len(codes)) for source in corpus.manifest.sources.tolist()), np.int64
    )
    return list(codes), source_of


def _known(corpus: Corpus, names: list[str], journal: Journal) -> dict[str, Record]:
    """Records of a former check whose files are as they were."""
    known = {}
    for name in names:
        record = journal.known.get(name)
        if record is None or record.status in AGAIN:
            continue
        try:
            same = (record.bytes, record.mtime_ns) == file_facts(corpus.manifest.root / name)
        except OSError:
            same = False
        if same:
            known[name] = record
    return known


def _inspect(names: list[str], corpus: Corpus, data: DataConfig, num_workers: int) -> Iterator[Record]:
    read = partial(inspect_source, root=corpus.manifest.root, kind=corpus.kind, data=data)
    tasks = deque(_by_size(names, corpus.manifest.root))
    tried: set[str] = set()
    while tasks:
        factor, group = tasks.popleft()
        slow: list[str] = []
        seconds = data.decode_timeout_seconds * factor
        workers = min(num_workers, len(group))
        for name, found in watched_map(read, group, num_workers=workers, timeout_seconds=seconds, in_order=False):
            if isinstance(found, SourceError) and name not in tried:
                slow.append(name)
            elif isinstance(found, SourceError):
                yield Record(source=name, status="hung", reason=found.what, **_facts(corpus.manifest.root / name))
            else:
                yield found
        if slow:
            # Once more with twice the time: the machine may have been busy.
            tried.update(slow)
            tasks.append((2 * factor, slow))


def _facts(path: Path) -> dict[str, Any]:
    try:
        size, stamp = file_facts(path)
    except OSError:
        return {}
    return {"bytes": size, "mtime_ns": stamp}


def _by_size(names: list[str], root: Path) -> list[tuple[int, list[str]]]:
    """Sources with the multiple of the time limit that their size deserves: 1 up to 16 MiB, then 4, 16, ..."""
    groups: dict[int, list[str]] = {}
    for name in names:
        factor, size = 1, _facts(root / name).get("bytes", 0)
        while size > factor * _TIMEOUT_BYTES:
            factor *= 4
        groups.setdefault(factor, []).append(name)
    return sorted(groups.items())


def _of_arrays(corpus: Corpus, tick: Callable[[int, int], None]) -> dict[str, Record]:
    """Records of a corpus that is in memory: its rows can all be read, but may be copies of each other."""
    import torch

    assert corpus.arrays is not None
    _, steps, _, height, width = corpus.arrays.shape
    wanted = places(np.arange(steps, dtype=np.float64), (-0.5, steps - 0.5))
    records = {}
    names = corpus.manifest.sources.tolist()
    for row, name in enumerate(names):
        array = corpus.arrays[row]
        records[name] = Record(
            source=name,
            status="ok",
            frames=steps,
            width=width,
            height=height,
            codec=str(array.dtype),
            pixel_hash=hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=HASH_BYTES).hexdigest(),
            signature=packed_signature(small_gray(torch.from_numpy(np.ascontiguousarray(array[wanted])))),
        )
        if row % 1000 == 0:
            tick(row, len(names))
    return records


_KINDS = {"bad": "cannot be read", "hung": "hangs or crashes", "missing": "missing", "unread": "not read"}


def _file_findings(records: Sequence[Record]) -> list[Finding]:
    findings = []
    for record in records:
        if record.status != "ok":
            findings.append(Finding(_KINDS[record.status], record.source, record.reason))
        elif record.signature == "":
            findings.append(Finding("blank", record.source, "shows nothing: it is of one color", bad=False))
    return findings


def _window_findings(corpus: Corpus, records: Sequence[Record], source_of: NDArray[np.int64]) -> list[Finding]:
    """Rows whose window lies outside of the source, or reaches beyond its end by more than a frame."""
    manifest = corpus.manifest
    findings = []
    for row in np.flatnonzero(~np.isnan(manifest.start_seconds)).tolist():
        record, (start, end) = records[source_of[row]], manifest.window(row) or (0.0, 0.0)
        if record.status != "ok":
            continue
        where = f"row {row + 1}: {record.source}"
        if record.start_seconds is None or record.seconds is None:
            what = f"start_seconds and end_seconds are for videos, not for a {corpus.kind}"
            findings.append(Finding("window", where, what))
            continue
        first, last = record.start_seconds, record.start_seconds + record.seconds
        frame = 1 / record.fps if record.fps else record.seconds
        if not record.shows((start, end)):
            what = f"nothing lies between {start:g} and {end:g} seconds: it shows from {first:g} to {last:g}"
            findings.append(Finding("window", where, what))
        elif start < first - frame or end > last + frame:
            what = f"from {start:g} to {end:g} seconds, but it shows from {first:g} to {last:g}: the rest is cut off"
            findings.append(Finding("window", where, what, bad=False))
    return findings


def _row_findings(corpus: Corpus, source_of: NDArray[np.int64], names: list[str]) -> list[Finding]:
    """Rows with the same source and window."""
    manifest = corpus.manifest
    windows = np.nan_to_num(np.stack([manifest.start_seconds, manifest.end_seconds], axis=1), nan=-1.0)
    keys = np.concatenate([source_of[:, None].astype(np.float64), windows], axis=1)
    order = np.lexsort(keys.T[::-1])
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    findings = []
    for place in np.flatnonzero(same).tolist():
        first, second = sorted((int(order[place]), int(order[place + 1])))
        a, b = (corpus.classes[manifest.labels[row]] if manifest.labels[row] >= 0 else "" for row in (first, second))
        where = f"row {second + 1}: {names[source_of[second]]}"
        what = f"is listed before, in row {first + 1}" + (f", as {a!r}, not {b!r}" if a != b else "")
        findings.append(Finding("conflict" if a != b else "listed twice", where, what, bad=a != b))
    return findings


def _write(checked: Checked, uses: Uses, data: DataConfig) -> None:
    folder, pairs = checked.folder, checked.duplicates.pairs
    (folder / SUMMARY).unlink(missing_ok=True)
    write_table(folder / TABLE, checked.records)
    write_findings(folder / PROBLEMS, checked.findings)
    write_pairs(folder / DUPLICATES, pairs, uses)
    (folder / SHEET).unlink(missing_ok=True)
    write_contact_sheet(folder / SHEET, pairs, uses, checked.corpus, data)
    counts = Counter(finding.kind for finding in checked.findings if finding.bad)
    summary = {
        "format": FORMAT,
        "dataset": checked.corpus.name,
        **header_of(checked.corpus, data),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sources": len(checked.records),
        "rows": len(checked.corpus.manifest),
        "status": dict(Counter(record.status for record in checked.records)),
        "bad": dict(counts),
        "warnings": dict(Counter(finding.kind for finding in checked.findings if not finding.bad)),
    }
    with whole_text(folder / SUMMARY) as file:
        json.dump(summary, file, indent=2, ensure_ascii=False)
        file.write("\n")
