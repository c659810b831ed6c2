"""Training takes from a check what cannot be read, and only that."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.command_line import QUICK, videogru, write_video
from videogru.config import DataConfig
from videogru.data.manifests.corpus import open_corpus
from videogru.data_check.excluded_rows import bad_rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checked folder of 12 videos, of which b/1 and b/2 are cut off; all in train but two each."""
    monkeypatch.chdir(tmp_path)
    for label, bright in (("a", True), ("b", False)):
        (tmp_path / "clips" / label).mkdir(parents=True)
        for number in range(6):
            write_video(tmp_path / "clips" / label / f"{number}.mp4", bright=bright, seed=number + 10 * bright)
    for number in (1, 2):
        path = tmp_path / f"clips/b/{number}.mp4"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = [
        f"{label}/{n}.mp4,{label},{('val', 'test')[n - 4] if n > 3 else 'train'}" for label in "ab" for n in range(6)
    ]
    (tmp_path / "clips/table.csv").write_text("source,label,split\n" + "\n".join(rows) + "\n")
    assert videogru("data", "check", "clips/table.csv", "--set", "train.num_workers=0").code == 3
    return tmp_path


def left_out(**settings: object) -> tuple[set[str], str]:
    data = DataConfig(dataset="clips/table.csv", **settings)
    corpus = open_corpus(data)
    found, notes = bad_rows(corpus, data)
    return {str(corpus.manifest.sources[row]) for row in found}, "; ".join(notes)


def test_what_is_left_out(place: Path) -> None:
    bad, notes = left_out()
    assert bad == {"b/1.mp4", "b/2.mp4"}
    assert "2 rows are left out" in notes
    assert "checks/table/check.csv" in notes
    assert left_out(use_check=False) == (set(), "")
    assert left_out(decoder="decord")[0] == set()


def test_a_file_that_was_replaced_is_read(place: Path) -> None:
    write_video(place / "clips/b/1.mp4", bright=False, seed=99)
    bad, notes = left_out()
    assert bad == {"b/2.mp4"}
    assert "1 rows that a check found bad have other files since" in notes
    # The same bytes at another time are another file.
    os.utime(place / "clips/b/2.mp4", ns=(1, 1))
    assert left_out()[0] == set()


def test_a_missing_file_that_came_back(place: Path) -> None:
    (place / "clips/a/0.mp4").rename("kept.mp4")
    videogru("data", "check", "clips/table.csv", "--set", "train.num_workers=0")
    assert "a/0.mp4" in left_out()[0]
    Path("kept.mp4").rename("clips/a/0.mp4")
    assert "a/0.mp4" not in left_out()[0]


def test_rows_that_were_added_are_told(place: Path) -> None:
    write_video(place / "clips/b/new.mp4", bright=False, seed=98)
    with Path("clips/table.csv").open("a") as file:
        file.write("b/new.mp4,b,train\n")
    assert "1 of 13 rows were not there" in left_out()[1]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("check.csv", lambda text: text[: len(text) // 2]),
        ("check.csv", lambda text: "\n".join(text.splitlines()[:-1]) + "\n"),
        ("check.csv", lambda text: text.replace(",bad,", ",worse,")),
        ("summary.json", lambda text: text[:40]),
        ("summary.json", lambda text: text.replace('"format": 1', '"format": 2')),
    ],
)
def test_a_damaged_check_is_named_and_ignored(place: Path, name: str, damage) -> None:
    path = place / "checks/table" / name
    path.write_text(damage(path.read_text()))
    bad, notes = left_out()
    assert not bad
    assert "ignored" in notes
    assert str(Path("checks/table") / name) in notes


def test_a_check_that_was_not_finished_counts_for_nothing(place: Path) -> None:
    (place / "checks/table/summary.json").unlink()
    assert left_out() == (set(), "")


def test_windows_outside_are_left_out(place: Path) -> None:
    rows = ["a/0.mp4,a,train,0,0.5", "a/0.mp4,a,train,3,4", "b/0.mp4,b,train,0,1"]
    Path("clips/table.csv").write_text("source,label,split,start_seconds,end_seconds\n" + "\n".join(rows) + "\n")
    data = DataConfig(dataset="clips/table.csv")
    corpus = open_corpus(data)
    corpus = replace(corpus, left_out=bad_rows(corpus, data)[0])
    assert list(corpus.left_out) == [1]
    assert 1 not in corpus.training_rows("train")
    assert 1 in corpus.manifest.rows("train")


def test_training_lists_them_and_does_not_count_them(place: Path) -> None:
    settings = ("--set", "data.frame_size=16", "--set", "data.num_frames=2", "--set", "data.max_bad=0")
    done = videogru("train", "--dataset", "clips/table.csv", *QUICK, *settings, "--out", "run")
    assert done.code == 0, done.err
    assert "2 rows are left out" in done.err
    with Path("run/bad_files.csv").open(newline="") as file:
        lines = [(line["source"], line["found_by"]) for line in csv.DictReader(file)]
    assert lines == [("b/1.mp4", "check"), ("b/2.mp4", "check")]
    # A run goes on with the rows it began with, whatever a later check says.
    from videogru.training.callbacks import rows_left_out

    assert sorted(rows_left_out(Path("run"))) == [7, 8]
    done = videogru("train", "--dataset", "clips/table.csv", *QUICK, *settings, "--set", "data.use_check=false")
    assert done.code != 0
    assert "max_bad" in done.err
