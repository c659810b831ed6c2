"""`videogru data check`: what it finds, what it keeps, and that it survives."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support.command_line import KINDS, videogru, write_video
from videogru.data_check.results import Journal, Record, read_table
from videogru.errors import DataError

HERE = ("--set", "train.num_workers=0")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with 6 videos in two class folders."""
    monkeypatch.chdir(tmp_path)
    for label, bright in (("a", True), ("b", False)):
        (tmp_path / "clips" / label).mkdir(parents=True)
        for number in range(3):
            write_video(tmp_path / "clips" / label / f"{number}.mp4", bright=bright, seed=number + 10 * bright)
    return tmp_path


def check(*arguments: object) -> SimpleNamespace:
    done = videogru("data", "check", *arguments, *HERE)
    assert "Traceback" not in done.err
    return done


def table(folder: str) -> dict[str, dict[str, str]]:
    with (Path("checks") / folder / "check.csv").open(newline="", encoding="utf-8") as file:
        return {line["source"]: line for line in csv.DictReader(file)}


def problems(folder: str, severity: str = "bad") -> list[tuple[str, str]]:
    with (Path("checks") / folder / "problems.csv").open(newline="", encoding="utf-8") as file:
        return [(line["kind"], line["where"]) for line in csv.DictReader(file) if line["severity"] == severity]


def split_manifest(path: Path, rows: list[tuple[str, str, str]]) -> None:
    path.write_text("source,label,split\n" + "".join(",".join(row) + "\n" for row in rows))


def test_good_videos(place: Path) -> None:
    done = check("clips/")
    assert done.code == 0, done.out
    assert "all is good" in done.out
    line = table("clips")["a/0.mp4"]
    assert {name: line[name] for name in ("status", "frames", "declared_frames", "seconds", "fps", "rate")} == {
        "status": "ok",
        "frames": "12",
        "declared_frames": "12",
        "seconds": "1",
        "fps": "12",
        "rate": "constant",
    }
    assert (line["width"], line["height"], line["codec"], line["rotation_degrees"]) == ("48", "32", "mpeg4", "0")
    assert int(line["bytes"]) == (place / "clips/a/0.mp4").stat().st_size
    summary = json.loads(Path("checks/clips/summary.json").read_text())
    assert (summary["status"], summary["root"]) == ({"ok": 6}, str(place / "clips"))


def test_volumes_and_images(place: Path) -> None:
    for kind in ("volume", "image"):
        suffix, write = KINDS[kind]
        for label, flag in (("a", True), ("b", False)):
            (place / kind / label).mkdir(parents=True)
            for number in range(3):
                write(place / kind / label / f"{number}{suffix}", flag, number + 10 * flag)
        assert check(kind).code == 0
    line = table("volume")["a/0.nii.gz"]
    assert [line[name] for name in ("frames", "height", "width", "codec", "spacing_mm", "orientation")] == [
        *("12", "18", "20", "int16", "1 x 1 x 2.5", "RAS")
    ]
    line = table("image")["b/1.png"]
    assert [line[name] for name in ("frames", "height", "width", "codec", "format")] == ["1", "24", "30", "RGB", "PNG"]


def test_what_cannot_be_read(place: Path) -> None:
    good = (place / "clips/a/0.mp4").read_bytes()
    for name, content in (("cut.mp4", good[: len(good) * 2 // 3]), ("text.mp4", b"words"), ("empty.mp4", b"")):
        (place / "clips/b" / name).write_bytes(content)
    (place / "clips/b/nowhere.mp4").symlink_to("absent")
    os.mkfifo(place / "clips/b/pipe.mp4")
    done = check("clips/")
    assert done.code == 3
    status = {name: line["status"] for name, line in table("clips").items() if line["status"] != "ok"}
    bad = {f"b/{name}.mp4": "bad" for name in ("cut", "text", "empty", "pipe")}
    assert status == bad | {"b/nowhere.mp4": "missing"}
    for name in status:
        assert name in done.out


def test_frames_that_are_cut_off_are_counted(place: Path) -> None:
    """The index is at the front, the last frames are missing: the reason reports both sizes in bytes."""
    from shutil import which

    if which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")
    target = place / "clips/a/front.mp4"
    write_video(place / "whole.mp4", bright=True, seed=7, frames=60)
    command = ["ffmpeg", "-v", "error", "-i", "whole.mp4", "-c", "copy", "-movflags", "faststart"]
    subprocess.run([*command, str(target)], check=True)
    content = target.read_bytes()
    kept = int(len(content) * 0.8)
    target.write_bytes(content[:kept])
    assert check("clips/").code == 3
    line = table("clips")["a/front.mp4"]
    assert line["status"] == "bad"
    assert "is cut off" in line["reason"]
    assert f"{kept:,} bytes" in line["reason"] and f"{len(content):,}" in line["reason"]


def test_copies_across_splits(place: Path) -> None:
    shutil.copy("clips/a/0.mp4", "clips/a/copy.mp4")
    source, rows = "clips/a/1.mp4", [("a/0.mp4", "a", "train"), ("a/1.mp4", "a", "train"), ("b/1.mp4", "b", "train")]
    rows += [("b/0.mp4", "b", "val"), ("a/copy.mp4", "a", "test"), ("b/remuxed.mkv", "b", "test")]
    import av

    with av.open(source) as old, av.open("clips/b/remuxed.mkv", "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    split_manifest(Path("clips/table.csv"), rows)
    done = check("clips/table.csv")
    assert done.code == 3
    with Path("checks/table/duplicates.csv").open(newline="") as file:
        pairs = {(line["finding"], line["same"], line["second_source"]) for line in csv.DictReader(file)}
    assert pairs == {("leak", "file", "a/copy.mp4"), ("leak+conflict", "pixels", "b/remuxed.mkv")}
    assert "2 validation and test sources show what training sources show" in done.out
    with Image.open("checks/table/duplicates.png") as sheet:
        assert np.asarray(sheet.convert("L")).std() > 10
    # Without the copies nothing is left to report.
    split_manifest(Path("clips/table.csv"), rows[:4])
    assert check("clips/table.csv").code == 0
    assert not Path("checks/table/duplicates.png").exists()


def test_mistakes_in_a_manifest_do_not_stop_the_files(place: Path) -> None:
    rows = [(f"{label}/{number}.mp4", label, "train") for label in "ab" for number in range(3)]
    split_manifest(Path("clips/table.csv"), [*rows[:5], ("b/2.mp4", "b", "trian"), ("../x.mp4", "b", "test")])
    done = check("clips/table.csv")
    assert done.code == 3
    assert [(kind, where[-2:]) for kind, where in problems("table")] == [("row", ":7"), ("row", ":8")]
    assert len(table("table")) == 5


def test_windows_outside_of_the_video(place: Path) -> None:
    lines = ["a/0.mp4,a,0,0.5", "a/0.mp4,a,0.5,1.5", "a/0.mp4,a,1,2", "b/0.mp4,b,0,1", "b/0.mp4,b,0,1"]
    Path("clips/table.csv").write_text("source,label,start_seconds,end_seconds\n" + "\n".join(lines) + "\n")
    assert check("clips/table.csv").code == 3
    assert problems("table") == [("window", "row 3: a/0.mp4")]
    assert problems("table", "warning") == [("window", "row 2: a/0.mp4"), ("listed twice", "row 5: b/0.mp4")]
    assert len(table("table")) == 2  # each file once


def test_an_empty_class_folder_and_a_typo(place: Path) -> None:
    (place / "clips/c").mkdir()
    for label in ("walking", "walkin"):
        (place / "clips" / label).mkdir()
    for number in range(4):
        write_video(place / "clips/walking" / f"{number}.mp4", bright=True, seed=50 + number)
    write_video(place / "clips/walkin/x.mp4", bright=True, seed=60)
    done = check("clips/")
    assert done.code == 3
    assert {kind for kind, _ in problems("clips")} == {"empty class", "label typo"}
    assert "'walkin' (1 row) looks like 'walking' (4 rows)" in done.out


def test_unusable_data_are_one_message(place: Path) -> None:
    (place / "nothing").mkdir()
    (place / "taken").write_text("")
    for arguments in (
        ("nothing/",),
        ("absent/",),
        ("clips/", "--out", "taken"),
        ("clips/", "--out", "clips/a/0.mp4/x"),
    ):
        done = check(*arguments)
        assert done.code == 2, arguments
        assert done.err.count("error:") == 1


def test_a_folder_of_others_is_left_alone(place: Path) -> None:
    check("clips/", "--out", "results")
    shutil.copytree("clips", "others")
    done = check("others/", "--out", "results")
    assert (done.code, "other data" in done.err) == (2, True)
    Path("mine").mkdir()
    Path("mine/check.csv").write_text("mine")
    assert check("clips/", "--out", "mine").code == 2
    assert Path("mine/check.csv").read_text() == "mine"
    # By default each root gets its own folder.
    (place / "x").mkdir()
    shutil.copytree("clips", "x/clips")
    assert check("clips/").code == check("x/clips/").code == 0
    assert table("clips").keys() == table("clips-2").keys()


def test_names_of_all_kinds(place: Path) -> None:
    for name in ("a comma, and 'quotes\".mp4", "two\nlines.mp4", "\N{GRINNING FACE}.mp4", "=1+1.mp4", "[red]x.mp4"):
        write_video(place / "clips/a" / name, bright=True, seed=len(name) + 100)
    Path(os.fsdecode(b"clips/a/no text \xff.mp4")).write_bytes(b"x")
    done = check("clips/")
    assert done.code == 3
    found = table("clips")
    assert found["a/two\nlines.mp4"]["status"] == found["a/\N{GRINNING FACE}.mp4"]["status"] == "ok"
    assert [name for name, line in found.items() if line["status"] != "ok"] == ["a/no text \\udcff.mp4"]
    again = check("clips/")
    assert "12 unchanged" not in again.out
    assert "11 unchanged" in again.out


def test_it_goes_on_where_it_was_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from videogru.data_check import check as module

    real, read = module.inspect_source, []

    def stops(source: str, **how: object) -> Record:
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(source)
        return real(source, **how)

    monkeypatch.setattr(module, "inspect_source", stops)
    done = check("clips/")
    assert (done.code, "4 of 6" in done.err) == (130, True)
    assert not Path("checks/clips/summary.json").exists()
    # A kill may leave half a line.
    with Path("checks/clips/records.jsonl").open("a") as file:
        file.write('{"source": "b/2.mp4", "stat')
    monkeypatch.setattr(module, "inspect_source", lambda source, **how: read.append(source) or real(source, **how))
    assert check("clips/").code == 0
    assert sorted(read) == [f"{label}/{number}.mp4" for label in "ab" for number in range(3)]
    # What has changed is read again, and only that.
    read.clear()
    shutil.copy("clips/a/0.mp4", "clips/b/1.mp4")
    (place / "clips/b/2.mp4").unlink()
    assert check("clips/").code == 3
    assert read == ["b/1.mp4"]
    assert len(table("clips")) == 5


@pytest.mark.slow
def test_killed_halfway(place: Path, repository: Path) -> None:
    for number in range(200):
        write_video(place / "clips/a" / f"more{number}.mp4", bright=True, seed=number + 1000, frames=40)
    command = [sys.executable, "-m", "videogru", "data", "check", "clips/"]
    here = os.environ | {"PYTHONPATH": str(repository)}
    running = subprocess.Popen(command, env=here, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    records = Path("checks/clips/records.jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.read_bytes().count(b"\n") > 20):
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = records.read_bytes().count(b'"status"')
    assert kept >= 20
    done = check("clips/")
    assert done.code == 0, done.out
    assert f"({kept} unchanged" in done.out or f"({kept - 1} unchanged" in done.out
    assert len(table("clips")) == 206


def test_a_decoder_that_hangs_or_crashes_costs_one_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from videogru.data_check import check as module

    real = module.inspect_source

    def hostile(source: str, **how: object) -> Record:
        if source == "a/1.mp4":
            time.sleep(600)
        if source == "b/1.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        return real(source, **how)

    monkeypatch.setattr(module, "inspect_source", hostile)
    settings = ("--set", "train.num_workers=1", "--set", "data.decode_timeout_seconds=2")
    done = videogru("data", "check", "clips/", *settings)
    assert done.code == 3, done.err
    status = {name: line["status"] for name, line in table("clips").items()}
    assert status.pop("a/1.mp4") == status.pop("b/1.mp4") == "hung"
    assert set(status.values()) == {"ok"}
    # Tried again, although the files are the same.
    monkeypatch.setattr(module, "inspect_source", real)
    assert check("clips/").code == 0


@pytest.mark.slow
def test_two_checks_do_not_write_into_one_folder(tmp_path: Path) -> None:
    first = Journal(tmp_path, {"root": "x"})
    with pytest.raises(DataError, match="another check"):
        Journal(tmp_path, {"root": "x"})
    first.add(Record(source="a\n\udcff", status="ok", seconds=0.1))
    first.close()
    second = Journal(tmp_path, {"root": "x"})
    assert second.known == {"a\n\udcff": Record(source="a\n\udcff", status="ok", seconds=0.1)}
    second.close()
    other = Journal(tmp_path, {"root": "y"})
    assert not other.known
    other.close()


@pytest.mark.parametrize("damage", [lambda t: t[:-30], lambda t: "x" + t, lambda t: t.replace(",ok,", ",fine,")])
def test_a_damaged_table_is_refused(place: Path, damage) -> None:
    check("clips/")
    path = Path("checks/clips/check.csv")
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError):
        read_table(path)


def test_arrays() -> None:
    """Two copies are planted among the scans of a set that is held in memory."""
    from dataclasses import replace

    from videogru.config import DataConfig
    from videogru.data.manifests.corpus import open_corpus
    from videogru.data_check.check import Opened, check_corpus

    data = DataConfig(dataset="adrenalmnist3d").for_kind("volume")
    corpus = open_corpus(data)
    rows = np.concatenate([corpus.manifest.rows("train")[:40], corpus.manifest.rows("test")[:10]])
    arrays = corpus.arrays[rows]
    arrays[45] = arrays[3]
    small = replace(corpus, manifest=corpus.manifest.take(rows), arrays=arrays)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        checked = check_corpus(Opened(small, []), Path(folder), data=data, num_workers=0)
    assert [(pair.first, pair.second, pair.same, pair.leak) for pair in checked.duplicates.pairs] == [
        (3, 45, "pixels", True)
    ]
    assert checked.bad
