import random
from pathlib import Path

import pytest

from videogru.data.manifests.table import read_columns, read_table
from videogru.errors import DataError


def by_csv(path: Path) -> object:
    """Python's csv module is the judge of what a CSV holds."""
    try:
        return [[cell.strip() for cell in row] for row in read_table(path)[1]]
    except DataError as error:
        return str(error)


def by_arrow(path: Path) -> object:
    try:
        table = read_columns(path, ["source", "label"])
        return [list(row) for row in zip(*(table.text(name).to_pylist() for name in ("source", "label")), strict=True)]
    except DataError as error:
        return str(error)


def test_odd_tables_read_as_the_csv_module_reads_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    odd = ["é", '"', '""', "\u00a0", "\n", "\r\n", "\r", ",", "\0", "\x1c", ";", "\u2028"]

    def cell() -> str:
        text = "".join(rng.choice(odd) if rng.random() < 0.2 else rng.choice("abc ") for _ in range(rng.randrange(6)))
        return text if rng.random() < 0.5 else '"' + text.replace('"', '""') + '"'

    path, refused = tmp_path / "set.csv", 0
    for _ in range(2000):
        lines = ["source,label", *(f"{cell()},{cell()}" for _ in range(rng.randrange(1, 5)))]
        content = rng.choice(["\n", "\r\n"]).join(lines).encode()
        if rng.random() < 0.05:
            content = content[:-1] + b"\xff"
        path.write_bytes(content)
        expected = by_csv(path)
        refused += isinstance(expected, str)
        assert by_arrow(path) == expected, content
    assert 200 < refused < 1800


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damaged_tables_are_refused(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table({"source": [f"{row}.mp4" for row in range(300)], "label": ["a", "b", "c"] * 100})
    path = tmp_path / f"set{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.3 else damaged)
        answer = by_arrow(path)
        refused += isinstance(answer, str)
    assert refused > 30
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"set{suffix}: cannot be read"):
        read_columns(path, ["source"])
    with pytest.raises(DataError, match=f"absent{suffix}: cannot be read: "):
        read_columns(tmp_path / f"absent{suffix}", ["source"])


def test_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"source": [[1], [2]], "label": ["a", "b"]}), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="column 'source' holds list"):
        read_columns(tmp_path / "set.parquet", ["source", "label"])


def test_seconds(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("source,start_seconds\na,0.30000000000000004\nb,\nc, 1e3 \nd,1_0\n")
    values, wrong = read_columns(path, ["source", "start_seconds"]).seconds("start_seconds")
    assert values[[0, 2, 3]].tolist() == [0.30000000000000004, 1000.0, 10.0]
    assert (wrong, str(values[1])) == (-1, "nan")
    path.write_text("source,start_seconds\na,1\nb,inf\nc,soon\n")
    assert read_columns(path, ["source", "start_seconds"]).seconds("start_seconds")[1] == 1
