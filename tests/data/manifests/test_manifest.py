from pathlib import Path

import numpy as np
import pytest

from videogru.data.manifests.manifest import Manifest, build_manifest, missing_rows, read_manifest
from videogru.errors import DataError


def write(folder: Path, text: str) -> Path:
    path = folder / "set.csv"
    path.write_text(text)
    return path


def whole(labels: list[int], splits: list[int] | None = None) -> Manifest:
    classes = [f"c{code}" for code in range(max(labels) + 1)]
    return build_manifest(Path("/x"), classes, [f"{row:07d}.mp4" for row in range(len(labels))], labels, splits)


def test_reads_all_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "source,label,split,group,start_seconds,end_seconds,speaker\n"
        "a.mp4,yes,train,p1,0.5,1.25,x\n"
        '"b, c.mp4",no,,,,,y\n'
        "\n"
        "a.mp4,no,train,p1,2,3,x\n",
    )
    manifest = read_manifest(path)
    assert manifest.classes == ("no", "yes")
    assert manifest.labels.tolist() == [1, 0, 0]
    assert manifest.splits.tolist() == [0, -1, 0]
    assert manifest.groups.tolist() == ["p1", "b, c.mp4", "p1"]
    assert [manifest.window(row) for row in range(3)] == [(0.5, 1.25), None, (2.0, 3.0)]
    assert manifest.path(1) == tmp_path / "b, c.mp4"
    assert manifest.rows("train").tolist() == [0, 2]
    assert "3 rows" in repr(manifest)


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes("\ufeffsource,label\nä.mp4,ü\nb.mp4,v\n".encode())
    assert read_manifest(path).classes == ("v", "ü")


def test_given_classes_keep_their_codes(tmp_path: Path) -> None:
    path = write(tmp_path, "source,label\na.mp4,one\nb.mp4,two\n")
    assert read_manifest(path, ("zero", "two", "one")).labels.tolist() == [2, 1]


def test_round_trip(tmp_path: Path) -> None:
    text = "source,label,split,group,start_seconds,end_seconds\na.mp4,x,train,g,0.1,0.30000000000000004\nb.mp4,y,,h,,\n"
    first = read_manifest(write(tmp_path, text))
    first.to_csv(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == text
    again = read_manifest(tmp_path / "again.csv")
    for column in ("sources", "labels", "splits", "groups", "start_seconds", "end_seconds"):
        np.testing.assert_array_equal(getattr(first, column), getattr(again, column))


def test_empty_columns_are_not_written(tmp_path: Path) -> None:
    whole([0, 1]).to_csv(tmp_path / "set.csv")
    assert (tmp_path / "set.csv").read_text() == "source,label\n0000000.mp4,c0\n0000001.mp4,c1\n"
    assert not (tmp_path / "set.csv.part").exists()


def test_to_csv_names_the_folder_it_cannot_write_to(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        whole([0, 1]).to_csv(tmp_path / "absent" / "set.csv")


def test_take(tmp_path: Path) -> None:
    part = whole([0, 1, 2, 0]).take(np.array([3, 1]))
    assert part.sources.tolist() == ["0000003.mp4", "0000001.mp4"]
    assert part.labels.tolist() == [0, 1]
    assert len(part.classes) == 3


HEAD = "source,label,split,group,start_seconds,end_seconds\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("source,label\n", "no rows"),
        ("file,label\na,b\n", "no column 'source', found file, label"),
        ("source,class\na,b\n", "no column 'label', found source, class"),
        ("source,label,label\na,b,c\n", "two columns 'label'"),
        ("source,label\na.mp4,x\nb.mp4,\n", r"set.csv:3: no label for b.mp4"),
        ("source,label\na.mp4,x\n,x\n", r"set.csv:3: no source"),
        ("source,label\na.mp4,x\nb,c.mp4,x\n", r"set.csv:3: 3 cells, but the header has 2"),
        (HEAD + "a.mp4,x,trian,,,\n", r"set.csv:2: unknown split 'trian'"),
        (HEAD + "a.mp4,x,train,g,,\nc.mp4,x,,g,,\nb.mp4,y,test,g,,\n", r"set.csv:4: group 'g' is in test .* line 2"),
        (HEAD + "a.mp4,x,train,,0,1\na.mp4,y,test,,1,2\n", r"set.csv:3: group 'a.mp4'"),
        (HEAD + "a.mp4,x,,,2,2\n", r"set.csv:2: start_seconds 2 is not before end_seconds 2"),
        (HEAD + "a.mp4,x,,,soon,2\n", r"set.csv:2: start_seconds must be a number"),
        (HEAD + "a.mp4,x,,,nan,2\n", r"set.csv:2: start_seconds must be a number"),
        (HEAD + "a.mp4,x,,,-1,2\n", r"set.csv:2: start_seconds must be a number"),
        (HEAD + "a.mp4,x,,,1,\n", r"set.csv:2: only one of"),
        ("source,label\n/etc/passwd,x\n", r"set.csv:2: source '/etc/passwd' is outside"),
        ("source,label\na/../../b.mp4,x\n", r"set.csv:2: .* is outside"),
        ("source,label\nC:\\b.mp4,x\n", r"set.csv:2: .* is outside"),
        ("source,label\n\\\\host\\b.mp4,x\n", r"set.csv:2: .* is outside"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_manifest(write(tmp_path, text))


def test_two_dots_inside_a_name_are_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, "source,label\nwhat..mp4,x\n12:30.mp4,y\n")
    assert read_manifest(path).sources.tolist() == ["what..mp4", "12:30.mp4"]


def test_another_spelling_is_the_same_file(tmp_path: Path) -> None:
    table = write(tmp_path, "source,label\nc/a.mp4,x\n./c//b.mp4,x\nc/./a.mp4,y\nc/d/,y\n.e.mp4,y\nf..mp4,y\n")
    found = read_manifest(table)
    assert found.sources.tolist() == ["c/a.mp4", "c/b.mp4", "c/a.mp4", "c/d", ".e.mp4", "f..mp4"]
    assert found.groups.tolist()[0] == found.groups.tolist()[2]
    shared = write(tmp_path, "source,label,split\nc/a.mp4,x,train\n./c/a.mp4,x,test\n")
    with pytest.raises(DataError, match="set.csv:3: group 'c/a.mp4' is in test here but in train on line 2"):
        read_manifest(shared)


@pytest.mark.parametrize("text", ["source;label\na.mp4;x\n", "a,b\n1,2\n", '"a",b\n"1",2\n'])
def test_a_table_of_other_columns(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="no column 'source', found"):
        read_manifest(write(tmp_path, text))


def test_unknown_label_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "source,label\na.mp4,zero\nb.mp4,sevn\n")
    with pytest.raises(DataError, match="(?s)set.csv:3: unknown label 'sevn'.*Did you mean seven"):
        read_manifest(path, ("zero", "seven"))


def test_links_may_not_leave_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    for place in (outside, root / "real"):
        (place / "a.mp4").touch()
    (root / "folder").symlink_to(outside)
    (root / "inner").symlink_to(root / "real")
    (root / "file.mp4").symlink_to(outside / "a.mp4")
    assert len(read_manifest(write(root, "source,label\ninner/a.mp4,x\nreal/a.mp4,x\n"))) == 2
    with pytest.raises(DataError, match="set.csv:2: .*folder"):
        read_manifest(write(root, "source,label\nfolder/a.mp4,x\n"))
    with pytest.raises(DataError, match="set.csv:3: .*link"):
        read_manifest(write(root, "source,label\nreal/a.mp4,x\nfile.mp4,x\n"))
    assert read_manifest(write(root, "source,label\na.mp4,x\n"), root=outside).path(0) == outside / "a.mp4"


def test_not_utf8_and_absent(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes("source,label\nä.mp4,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_manifest(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path / "absent.csv")


def test_missing_rows(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.mp4").touch()
    manifest = read_manifest(write(tmp_path, "source,label\nd/a.mp4,x\nd/b.mp4,x\ne/c.mp4,x\n"))
    assert missing_rows(manifest).tolist() == [0, 2]


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        build_manifest(Path(), ("a", "b"), ["x"], [0, 1])
    with pytest.raises(ValueError, match="labels"):
        build_manifest(Path(), ("a", "b"), ["x", "y"], [0, 2])


def test_parquet_and_arrow_tables_are_the_csv(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table(
        {
            "source": [" a.mp4", "b, c.mp4", "a.mp4"],
            "label": pa.array([1, 0, 0]),
            "split": pa.array(["train", None, "train"]).dictionary_encode(),
            "group": ["p1", None, "p1"],
            "start_seconds": [0.5, None, 2.0],
            "end_seconds": pa.array([1, None, 3]),
            "more": [[1], [], []],
        }
    )
    parquet.write_table(table, tmp_path / "set.parquet")
    with pa.OSFile(str(tmp_path / "set.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("set.parquet", "set.arrow"):
        manifest = read_manifest(tmp_path / name)
        assert manifest.sources.tolist() == ["a.mp4", "b, c.mp4", "a.mp4"]
        assert (manifest.classes, manifest.labels.tolist()) == (("0", "1"), [1, 0, 0])
        assert (manifest.splits.tolist(), manifest.groups.tolist()) == ([0, -1, 0], ["p1", "b, c.mp4", "p1"])
        assert [manifest.window(row) for row in range(3)] == [(0.5, 1.0), None, (2.0, 3.0)]
    parquet.write_table(table.set_column(0, "source", [["a.mp4", "/b.mp4", "c"]]), tmp_path / "set.parquet")
    with pytest.raises(DataError, match=r"set.parquet: row 2: source '/b.mp4' is outside"):
        read_manifest(tmp_path / "set.parquet")
    two = table.set_column(2, "split", [["train", "val", "test"]])
    parquet.write_table(two, tmp_path / "set.parquet")
    with pytest.raises(DataError, match=r"row 3: group 'p1' is in test here but in train on row 1"):
        read_manifest(tmp_path / "set.parquet")
