"""The table of a check: what each source of a data set is, and what is wrong with it.

records.jsonl   one line per source, appended while the check runs and kept: a check that goes on reads it
check.csv       the same for people and for training, in the order of the data set; written when the check is done
summary.json    of which data set, when, and how many; written last: without it there is no finished check
"""

import csv
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from videogru.errors import DataError

# hung: its reader hung or crashed; unread: the system did not let us. Both are tried again by the next check.
Status = Literal["ok", "bad", "hung", "missing", "unread"]
STATUSES: tuple[str, ...] = get_args(Status)
AGAIN = frozenset({"hung", "missing", "unread"})
RECORDS, TABLE, SUMMARY = "records.jsonl", "check.csv", "summary.json"
FORMAT = 1
HASH_BYTES = 16
_HASH_LETTERS = 2 * HASH_BYTES
_ORPHANS_SECONDS = 5.0  # readers look for their parent once a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One source. frames: that can be decoded (slices of a volume); start_seconds: of its first frame.

    codec: of a video, mode of an image, data type of a volume; width, height: of a frame, turned upright; spacing_mm:
    x, y, z in RAS order; bytes, mtime_ns: of the file as it was read, by which a later change is seen; signature: see
    perceptual_hash.py.
    """

    source: str
    status: Status
    reason: str = ""
    frames: int | None = None
    declared_frames: int | None = None
    start_seconds: float | None = None
    seconds: float | None = None
    fps: float | None = None
    rate: str = ""
    width: int | None = None
    height: int | None = None
    format: str = ""
    codec: str = ""
    rotation_degrees: int | None = None
    spacing_mm: str = ""
    orientation: str = ""
    bytes: int | None = None
    mtime_ns: int | None = None
    file_hash: str = ""
    pixel_hash: str = ""
    signature: str = ""

    def shows(self, window: tuple[float, float]) -> bool:
        """Some part of a window (start, end) in seconds lies in the video."""
        if self.start_seconds is None or self.seconds is None:
            return False
        return window[0] < self.start_seconds + self.seconds and window[1] > self.start_seconds


_COLUMNS = [field.name for field in fields(Record) if field.name != "signature"]
_TYPES = dict.fromkeys(
    ("frames", "declared_frames", "width", "height", "rotation_degrees", "bytes", "mtime_ns"), int
) | dict.fromkeys(("start_seconds", "seconds", "fps"), float)


@contextmanager
def whole_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file that is there whole or not at all. Raises DataError where it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        # File names need not be valid text.
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=path) from error


def write_table(path: Path, records: Iterable[Record]) -> None:
    """Write check.csv."""
    with whole_text(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([_cell(getattr(record, name)) for name in _COLUMNS] for record in records)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return "" if value is None else str(value)


def read_table(path: Path) -> list[Record]:
    """Read check.csv back, without signatures. Raises DataError that names the line where it is no such table."""
    line = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            if next(reader, None) != _COLUMNS:
                raise DataError("is no table of this version's check", where=path)
            records = []
            for cells in reader:
                line = reader.line_num
                records.append(_record(dict(zip(_COLUMNS, cells, strict=True))))
            return records
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"is damaged: {error}", where=f"{path}:{line}") from error


def _record(cells: dict[str, str]) -> Record:
    if cells["status"] not in STATUSES or not cells["source"]:
        raise ValueError(f"status {cells['status']!r} of source {cells['source']!r}")
    if any(len(cells[name]) not in (0, _HASH_LETTERS) for name in ("file_hash", "pixel_hash")):
        raise ValueError(f"the hashes of {cells['source']!r} are no hashes")
    values: dict[str, Any] = dict(cells)
    for name, kind in _TYPES.items():
        values[name] = kind(cells[name]) if cells[name] else None
    return Record(**values)


class Journal:
    """Appends records to records.jsonl; what is written survives a kill.

    header: what the records hold for; a journal with another header is of no use. Raises DataError where it cannot be
    written, or another check is writing it.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.path, self.header = folder / RECORDS, {"format": FORMAT, **header}
        self.known: dict[str, Record] = {}
        try:
            self._file = self.path.open("a+b")
            self._lock()
            self._file.seek(0)
            first, *lines = self._file.read().split(b"\n")
            if _parsed(first) == self.header:
                for record in map(_of_line, lines):
                    if record is not None:
                        self.known[record.source] = record
                self._file.write(b"\n")  # a kill may have left half a line
            else:
                self._file.truncate(0)
                self._file.write(json.dumps(self.header).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror or error}", where=self.path) from error

    def add(self, record: Record) -> None:
        """Write one. Raises DataError where the disk is full."""
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror or error}", where=self.path) from error

    def close(self) -> None:
        """Let go of the file, and let others in."""
        self._file.close()

    def replace(self, records: Sequence[Record]) -> None:
        """Put these in place of all, one line each; the last act of a check."""
        part = self.path.with_name(RECORDS + ".part")
        try:
            with part.open("wb") as file:
                file.write(json.dumps(self.header).encode() + b"\n")
                file.writelines(map(_line, records))
            part.replace(self.path)
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror or error}", where=self.path) from error

    def _lock(self) -> None:
        import fcntl

        # The readers of a check that was killed hold its lock until they notice.
        patience = time.monotonic() + _ORPHANS_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() < patience:
                    time.sleep(0.1)
                    continue
                self._file.close()
                raise DataError(
                    "another check is writing here", where=self.path, hint="Wait for it, or name another --out."
                ) from error


def _line(record: Record) -> bytes:
    # ASCII: names need not be valid text.
    kept = {name: value for name, value in asdict(record).items() if value not in (None, "")}
    return json.dumps(kept).encode() + b"\n"


def _of_line(line: bytes) -> Record | None:
    content = _parsed(line)
    try:
        return Record(**content) if isinstance(content, dict) and content.get("status") in STATUSES else None
    except TypeError:
        return None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a data set. kind: a short name by which findings are counted; where: a source, or a
    manifest and its line; bad: else it is only a warning.
    """

    kind: str
    where: str
    what: str
    bad: bool = True


def write_findings(path: Path, findings: Iterable[Finding]) -> None:
    """Write findings as CSV, those that are bad first."""
    with whole_text(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["severity", "kind", "where", "what"])
        for finding in sorted(findings, key=lambda one: not one.bad):
            writer.writerow(["bad" if finding.bad else "warning", finding.kind, finding.where, finding.what])
