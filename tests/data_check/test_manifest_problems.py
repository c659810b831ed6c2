from dataclasses import replace
from pathlib import Path

import pytest

from videogru.data.manifests.columns import Coded
from videogru.data.manifests.manifest import build_manifest, read_manifest
from videogru.data_check.manifest_problems import class_problems, edits, group_problems, label_typos, manifest_problems
from videogru.errors import DataError

HEADER = "source,label,split,group,start_seconds,end_seconds\n"
# Each is refused by itself; the words are those of the finding.
WRONG = {
    ",jump,train,,,": "no source",
    "b.mp4,,train,,,": "no label",
    "b.mp4,jump,train": "3 cells",
    "b.mp4,jump,tran,,,": "unknown split 'tran'",
    "b.mp4,jump,train,,1,": "only one of",
    "b.mp4,jump,train,,2,1": "not before",
    "b.mp4,jump,train,,x,1": "'x'",
    "../b.mp4,jump,train,,,": "outside of",
    "b.mp4,jump,test,one,,": "group 'one' is in test here but in train on line 2",
}


def problems(folder: Path, text: str | bytes, classes: tuple[str, ...] | None = None) -> tuple[list, Path]:
    path, good = folder / "table.csv", folder / "good.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return manifest_problems(path, classes, folder.resolve(), good), good


@pytest.mark.parametrize(("row", "words"), WRONG.items())
def test_each_mistake_has_its_line_and_is_one_that_training_refuses(tmp_path: Path, row: str, words: str) -> None:
    text = f"{HEADER}a.mp4,walk,train,one,,\n{row}\nc.mp4,jump,test,,,\n"
    found, good = problems(tmp_path, text)
    assert [(finding.where, words in finding.what) for finding in found] == [(f"{tmp_path / 'table.csv'}:3", True)]
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path / "table.csv")
    assert str(caught.value.where).endswith(":3")
    assert read_manifest(good).sources.tolist() == ["a.mp4", "c.mp4"]


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    rows = "".join(f"{row}\n" for row in WRONG)
    found, good = problems(tmp_path, f'{HEADER}"a\nb.mp4",walk,train,one,,\n{rows}c.mp4,jump,test,,,\n')
    lines = sorted(int(finding.where.rsplit(":", 1)[1]) for finding in found)
    assert lines == list(range(4, 4 + len(WRONG)))  # the first row has two lines
    assert len(read_manifest(good)) == 2


def test_labels_outside_of_the_known_classes(tmp_path: Path) -> None:
    found, _ = problems(tmp_path, "source,label\na,jump\nb,jumpp\n", ("jump", "walk"))
    assert [finding.what for finding in found] == ["unknown label 'jumpp'. Did you mean jump?"]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    found, good = problems(tmp_path, b"source,label\na,jump\n\xff.mp4,jump\nb,walk\n")
    assert [(finding.what, finding.where[-2:]) for finding in found] == [("not UTF-8", ":3")]
    assert len(read_manifest(good)) == 2


def test_no_row_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one row is usable"):
        problems(tmp_path, "source,label\na,\n")


def typos(*counts: tuple[str, int]) -> list[str]:
    labels = [label for label, count in counts for _ in range(count)]
    return [finding.what for finding in label_typos(labels, None, "here") if finding.bad]


def test_the_line_of_a_typo() -> None:
    labels = ["jumping"] * 40 + ["jumpping"] + ["running"] * 30
    found = label_typos(labels, range(2, 2 + len(labels)), "table.csv")
    what = "label 'jumpping' (1 row) looks like 'jumping' (40 rows)"
    assert [(finding.where, finding.what) for finding in found] == [("table.csv:42", what)]


@pytest.mark.parametrize("slip", ["jumpping", "jumpin", "jmuping", "Jumping", "jumping_", "jum-ping", "kumping"])
def test_slips(slip: str) -> None:
    assert len(typos(("jumping", 40), (slip, 2), ("running", 40))) == 1


@pytest.mark.parametrize(
    ("label", "count"),
    # Frequent; another word; a number; too short to tell.
    [("jumpping", 20), ("pumps", 1), ("jumping 2", 1), ("jump", 1), ("walk", 2)],
)
def test_no_slips(label: str, count: int) -> None:
    assert not typos(("jumping", 40), (label, count), ("jumping 1", 40), ("talks", 10))


def test_real_labels_are_no_typos(shared_data: Path) -> None:
    for name in ("words", "commands", "colours", "digits"):
        manifest = read_manifest(shared_data / "grid" / f"{name}.csv")
        labels = [manifest.classes[label] for label in manifest.labels.tolist()]
        assert not label_typos(labels, None, name)


def test_edits() -> None:
    # Damerau's four kinds of mistake, and the classic pair.
    for other in ("abcde", "abd", "abxd", "abdc"):
        assert edits("abcd", other, 3) == 1
    assert edits("kitten", "sitting", 3) == 3
    assert edits("kitten", "sitting", 2) == 3  # more than 2
    assert edits("ca", "abc", 3) == 3  # optimal string alignment, not Damerau-Levenshtein's 2


def test_classes_and_groups() -> None:
    manifest = build_manifest(Path(), ("a", "b", "c"), ["1", "2", "3"], [0, 0, 1], [0, 0, 2])
    found = {(finding.where, finding.bad) for finding in class_problems(manifest, folders=False)}
    assert found == {("b", False), ("c", False)}
    assert {finding.where for finding in class_problems(manifest, folders=True) if finding.bad} == {"c"}
    assert not group_problems(manifest)
    shared = replace(manifest, groups=Coded.of(["x", "y", "x"]))
    assert [finding.what for finding in group_problems(shared)] == ["group 'x' is in train and test"]
