"""What training takes from a check: rows whose source cannot be read are left out, as long as the file is the same."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from videogru.config import DataConfig
from videogru.data.manifests.corpus import Corpus
from videogru.data_check.inspect import file_facts
from videogru.data_check.results import FORMAT, SUMMARY, TABLE, Record, read_table
from videogru.errors import DataError

CHECKS = Path("checks")


def bad_rows(corpus: Corpus, data: DataConfig, *, checks: Path = CHECKS) -> tuple[dict[int, str], list[str]]:
    """Reasons by row of what the newest check of the corpus's root found bad, and what its user should know of that.

    A row is left out where its source was bad, hung or missing and is unchanged since (bytes and time), or where its
    window lies outside of the video. A table that cannot be read, or whose check is not finished, is named and ignored.
    Raises DataError where no training row is left.
    """
    if not data.use_check or corpus.arrays is not None:
        return {}, []
    found, notes = _newest(checks, corpus, data)
    if found is None:
        return {}, notes
    table, summary = found
    try:
        records = read_table(table)
        if len(records) != summary["sources"]:
            what = f"has {len(records)} lines, the check wrote {summary['sources']}"
            raise DataError(what, where=table)
    except DataError as error:
        return {}, [*notes, f"the check is ignored, check again: {error}"]
    left_out, changed, unknown = _bad_rows(corpus, {record.source: record for record in records})
    at = f"{table}, {summary['finished']}"
    if left_out:
        notes.append(
            f"{len(left_out)} rows are left out, which a check found bad ({at}); data.use_check=false reads them"
        )
    if changed:
        notes.append(f"{changed} rows that a check found bad have other files since, and are read ({at})")
    if unknown:
        notes.append(f"{unknown} of {len(corpus.manifest)} rows were not there when the data were checked ({at})")
    if not len(replace(corpus, left_out=left_out).training_rows("train")):
        hint = "Mend the files, or read them all the same: --set data.use_check=false"
        raise DataError("a check found every training row bad", where=table, hint=hint)
    return left_out, notes


def _newest(checks: Path, corpus: Corpus, data: DataConfig) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    found: list[tuple[str, Path, dict[str, Any]]] = []
    notes: list[str] = []
    for path in sorted(checks.glob(f"*/{SUMMARY}")):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            mine = (summary["root"], summary["kind"]) == (str(corpus.manifest.root), corpus.kind)
            if not mine:
                continue
            if summary["format"] != FORMAT:
                raise ValueError(f"format {summary['format']}, this version reads {FORMAT}")
            if not isinstance(summary["sources"], int):
                raise ValueError(f"sources {summary['sources']!r}")
            decoder = {"pyav": "auto"}.get(data.decoder, data.decoder)
            if {"pyav": "auto"}.get(summary["settings"]["decoder"], summary["settings"]["decoder"]) != decoder:
                notes.append(f"a check with another data.decoder is ignored: {path}")
                continue
            found.append((str(summary["finished"]), path.parent / TABLE, summary))
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"a check is ignored, check again: {path} cannot be used ({type(error).__name__}: {error})")
    if not found:
        return None, notes
    _, table, summary = max(found, key=lambda one: one[0])
    return (table, summary), notes


def _bad_rows(corpus: Corpus, records: dict[str, Record]) -> tuple[dict[int, str], int, int]:
    """Reasons by row, the number of rows whose bad source has changed, and of rows without a record."""
    manifest = corpus.manifest
    left_out: dict[int, str] = {}
    changed = unknown = 0
    same: dict[str, bool] = {}
    windowed = ~np.isnan(manifest.start_seconds)
    for row, source in enumerate(manifest.sources.tolist()):
        record = records.get(source)
        if record is None:
            unknown += 1
            continue
        window = manifest.window(row) if windowed[row] else None
        outside = record.status == "ok" and window is not None and not record.shows(window)
        if record.status in ("ok", "unread") and not outside:
            continue
        if source not in same:
            same[source] = _is_unchanged(manifest.root / source, record)
        if not same[source]:
            changed += 1
        elif outside and window is not None:
            left_out[row] = f"nothing lies between {window[0]:g} and {window[1]:g} seconds"
        else:
            left_out[row] = record.reason
    return left_out, changed, unknown


def _is_unchanged(path: Path, record: Record) -> bool:
    if record.status == "missing":
        return not os.path.lexists(path)
    try:
        return file_facts(path) == (record.bytes, record.mtime_ns)
    except OSError:
        return False
