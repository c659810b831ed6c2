"""Tables as columns of text: CSV, Parquet, Arrow.

Arrow reads CSV many times faster than Python's csv module, but says little about what it refuses. So csv decides: what
Arrow refuses is read again with csv, which either names the line or, being more lenient, has the rows.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from videogru.errors import DataError

FORMAT_HINT = "A manifest is a UTF-8 CSV with the columns source,label[,split,group,start_seconds,end_seconds]."
ARROW_SUFFIXES = frozenset({".parquet", ".arrow"})
TABLE_SUFFIXES = ARROW_SUFFIXES | {".csv"}


class Table:
    """Some columns of a file as Arrow arrays: large_string, trimmed, without nulls ('' where a cell is empty)."""

    def __init__(self, path: Path, header: list[str], columns: dict[str, Any], rows: int) -> None:
        self.path, self.header, self.columns, self.rows = path, header, columns, rows

    def where(self, row: int) -> str:
        """The place of a row for an error: the line it ends on, or its number from 1 where the file has no lines."""
        if self.path.suffix.lower() in ARROW_SUFFIXES:
            return f"{self.path}: row {row + 1}"
        return f"{self.path}:{read_table(self.path)[2][row]}"

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def text(self, name: str) -> Any:
        """A column as an Arrow chunked array."""
        return self.columns[name]

    def seconds(self, name: str) -> tuple[NDArray[np.float64], int]:
        """A column as (N,) float64, NaN where empty, and the first row that is no number from 0 on, or -1."""
        values = np.full(self.rows, np.nan)
        if name not in self:
            return values, -1
        column = self.text(name)
        filled = pc.not_equal(column, "")
        given = np.asarray(filled)
        if not given.any():
            return values, -1
        cells = column.filter(filled)
        try:
            numbers = np.asarray(pc.cast(cells, pa.float64()))
        except pa.ArrowInvalid:
            numbers = np.array([_number(cell) for cell in cells.to_pylist()])
        values[given] = numbers
        wrong = np.flatnonzero(given)[~(np.isfinite(numbers) & (numbers >= 0))]
        return values, int(wrong[0]) if len(wrong) else -1


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def read_columns(path: Path, names: Sequence[str]) -> Table:
    """The named columns of a .csv, .parquet or .arrow file, where it has them; other columns are ignored.

    Raises DataError where it cannot be read, has no header, no row, or a column twice; of a CSV it names the line.
    """
    arrow = path.suffix.lower() in ARROW_SUFFIXES
    header = _arrow_header(path) if arrow else _csv_header(path)
    for name in names:
        if header.count(name) > 1:
            raise DataError(f"two columns {name!r}", where=path, hint=FORMAT_HINT)
    wanted = [name for name in names if name in header]
    table = _read_arrow(path, wanted) if arrow else _read_csv(path, header, wanted)
    if not table.num_rows:
        raise DataError("the manifest has a header but no rows", where=path)
    # Taken out one by one, so that each can go once it is converted.
    columns = {name: _cells(path, name, table.column(name)) for name in wanted}
    return Table(path, header, columns, table.num_rows)


def _cells(path: Path, name: str, column: Any) -> Any:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(check(kind) for check in _READABLE):
        raise DataError(f"column {name!r} holds {column.type}, not text or numbers", where=path)
    text = pc.fill_null(pc.cast(column, pa.large_string()), "")
    return pc.utf8_trim_whitespace(text)


_READABLE = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_null,
)


def _arrow_header(path: Path) -> list[str]:
    return list(_guarded(path, lambda: _open_arrow(path)[0]))


def _read_arrow(path: Path, wanted: list[str]) -> Any:
    def read() -> Any:
        table = _open_arrow(path)[1](wanted)
        table.validate(full=True)  # offsets, UTF-8: nothing of a file is believed
        return table

    return _guarded(path, read)


def _open_arrow(path: Path) -> tuple[list[str], Any]:
    if path.suffix.lower() == ".parquet":
        file = parquet.ParquetFile(path)
        return file.schema_arrow.names, file.read
    stream = pa.ipc.open_file(pa.memory_map(str(path)))
    return stream.schema.names, lambda wanted: stream.read_all().select(wanted)


def _guarded(path: Path, read: Any) -> Any:
    try:
        return read()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from error
    except (pa.ArrowException, ValueError, MemoryError) as error:
        kind = path.suffix.lower()[1:]
        raise DataError(f"cannot be read as {kind}: {error}", where=path, hint="Write it again.") from error


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = [name.strip() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        header = read_table(path)[0]  # which says what is wrong
    if not header:
        raise DataError("the manifest is empty", where=path, hint=FORMAT_HINT)
    return header


def _read_csv(path: Path, header: list[str], wanted: list[str]) -> Any:
    keys = [str(place) for place in range(len(header))]  # names may repeat, or be empty
    places = [header.index(name) for name in wanted]
    if not wanted:  # Arrow would give it no rows
        return pa.table({"": read_table(path)[1]})
    try:
        table = arrow_csv.read_csv(
            path,
            # The header comes as a row, as a quoted one may have any number of lines.
            read_options=arrow_csv.ReadOptions(column_names=keys, block_size=2**24),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=_has_quotes(path)),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=[keys[place] for place in places],
                column_types=dict.fromkeys(keys, pa.large_string()),
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        rows = read_table(path)[1]
        return pa.table({name: [row[place] for row in rows] for name, place in zip(wanted, places, strict=True)})
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from error
    return table.rename_columns(wanted).slice(1)


def _has_quotes(path: Path) -> bool:
    with path.open("rb") as file:
        return any(b'"' in block for block in iter(lambda: file.read(2**22), b""))


def read_table(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows of as many cells, and the line each row ends on, of a CSV; blank lines are skipped."""
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
        raise DataError(f"not CSV: {error}", where=path, hint=FORMAT_HINT) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    if not header:
        raise DataError("the manifest is empty", where=path, hint=FORMAT_HINT)
    if not rows:
        raise DataError("the manifest has a header but no rows", where=path)
    return header, rows, lines
