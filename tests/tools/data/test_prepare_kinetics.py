"""tools/data/prepare_kinetics.py: what it encodes by ffprobe, what it does again, and what it refuses."""

import csv
import ctypes
import json
import shutil
import subprocess
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.command_line import write_video
from tools.data import prepare_kinetics as tool
from tools.data import prepared_folder
from tools.data.frame_numbers import number_in
from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.manifests.corpus import open_corpus
from videogru.data.readers.open import open_source

GOLDEN = Path(__file__).parents[2] / "golden"
TRUTH = json.loads((GOLDEN / "video_matrix.json").read_text(encoding="utf-8"))["made"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are prepared in this process: starting another takes longer than the work."""
    monkeypatch.setattr(tool, "watched_map", partial(_map, tool.watched_map, {"num_workers": 0}))


def _map(usual: Any, other: dict[str, Any], *arguments: Any, **named: Any) -> Any:
    return usual(*arguments, **{**named, **other})


def prepare(source: Path, out: Path, *flags: str) -> int:
    return tool.main([str(source), "--out", str(out), "--keep-free-gib", "0", *flags])


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """{file: (its node, when it was written)}: what another writing would change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def reasons(out: Path) -> dict[str, str]:
    with (out / "bad.csv").open(encoding="utf-8", newline="") as file:
        return {line["source"]: line["reason"] for line in csv.DictReader(file)}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two classes of two videos."""
    for number, name in enumerate(("x/1.mp4", "x/2.avi", "y/3.mp4", "y/4.mp4")):
        path = tmp_path / "clips" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, bright=name[0] == "x", seed=number)
    return tmp_path / "clips"


# What is encoded ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_outputs_by_ffprobe(tmp_path: Path) -> None:
    """Sides, key frames, no B-frames and times as ffprobe sees them, numbers as ffmpeg decodes them."""
    if not (shutil.which("ffprobe") and shutil.which("ffmpeg")):
        pytest.skip("ffprobe and ffmpeg, the truth of this test, are not here")
    names = ("vfr.mkv", "h264.ts", "turn_90.mp4", "late.mkv", "intra_refresh.mp4")
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(GOLDEN / "videos" / name, tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "out", "--short-side", "48", "--gop", "5") == 0
    assert prepare(tmp_path / "in", tmp_path / "whole", "--short-side", "64", "--gop", "7") == 0
    for name in names:  # turn_90.mp4 is stored as 64x96
        for folder, gop, size in (("out", 5, (72, 48)), ("whole", 7, (96, 64))):
            path = (tmp_path / folder / name).with_suffix(".mp4")
            command = ["ffprobe", "-v", "error", "-select_streams", "v", "-of", "json", "-show_streams"]
            shown = ["-show_entries", "frame=pts_time,key_frame,pict_type", str(path)]
            told = json.loads(subprocess.run([*command, *shown], check=True, capture_output=True).stdout)
            (stream,), frames = told["streams"], told["frames"]
            assert (stream["codec_name"], stream["width"], stream["height"]) == ("h264", *size)
            assert [number for number, frame in enumerate(frames) if frame["key_frame"]] == [
                *range(0, len(frames), gop)
            ]
            assert {frame["pict_type"] for frame in frames} == {"I", "P"}
            truth = TRUTH[name]
            wanted = [float(tick * Fraction(truth["time_base"])) for tick in truth["ticks"]]
            np.testing.assert_allclose([float(frame["pts_time"]) for frame in frames], wanted, rtol=0, atol=1e-4)
        command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-vsync", "0", "-"]
        raw = subprocess.run(command, check=True, capture_output=True).stdout
        pictures = np.frombuffer(raw, np.uint8).reshape(-1, 64, 96, 3)
        assert [number_in(picture) for picture in pictures] == TRUTH[name]["numbers"]


@pytest.mark.usefixtures("here")
def test_small_and_odd_videos_keep_their_size_but_for_a_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(GOLDEN / "videos" / "odd.webm", tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    with open_source(tmp_path / "in" / "odd.webm", data=DataConfig()) as source:
        height, width = source.read([0]).shape[2:]
    with open_source(tmp_path / "out" / "odd.mp4", data=DataConfig()) as output:
        made = output.read([0]).shape[2:]
    assert height % 2 and width % 2
    assert all(abs(a - b) == 1 and a % 2 == 0 for a, b in zip(made, (height, width), strict=True))


@pytest.mark.usefixtures("here")
def test_a_frame_that_differs_or_is_lost_is_never_kept(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tool.encode

    def worse(source: Any, target: Path, settings: Any) -> Any:
        size, samples = usual(source, target, settings)
        return size, {index: 255 - frame for index, frame in samples.items()}

    def shorter(source: Any, target: Path, settings: Any) -> Any:
        part = {name: getattr(source, name) for name in ("read", "path", "extent", "pixel_aspect")}
        return usual(SimpleNamespace(positions=source.positions[:-1], **part), target, settings)  # type: ignore[arg-type]

    for encode, reason in ((worse, "differs from the source"), (shorter, "has 11 frames of 12")):
        monkeypatch.setattr(tool, "encode", encode)
        assert prepare(clips, tmp_path / "out") == 3
        assert all(reason in told for told in reasons(tmp_path / "out").values())
        assert not [*(tmp_path / "out").rglob("*.mp4"), *(tmp_path / "out").rglob("*.part")]
    monkeypatch.setattr(tool, "encode", usual)
    assert prepare(clips, tmp_path / "out") == 0


# What is done again ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_second_call_does_only_the_rest(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tables = tmp_path / "out", {"bad.csv"}
    (clips / "empty.mp4").touch()
    assert prepare(clips, out) == 3
    assert reasons(out) == {"empty.mp4": "is empty (0 bytes)"}
    assert "such as empty.mp4: is empty" in capsys.readouterr().out
    (clips / "empty.mp4").unlink()
    before = states(out)
    monkeypatch.setattr(tool, "prepare", lambda task: pytest.fail(f"{task.source} was prepared again"))
    assert prepare(clips, out) == 0
    told = capsys.readouterr()
    assert "4 videos, 4 of them done; 0 to do" in told.err
    assert "4 of 4 videos are in" in told.out and "could not" not in told.out
    after = states(out)
    assert {name: state for name, state in after.items() if name not in tables} == {
        name: state for name, state in before.items() if name not in tables
    }


@pytest.mark.usefixtures("here")
def test_what_a_kill_left_is_never_taken_for_whole(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(clips, out) == 0
    whole = {path: path.read_bytes() for path in out.rglob("*.mp4")}
    # Killed while writing an output; cut after its name was taken; killed while writing the journal.
    (out / "x" / ".1.mp4.part").write_bytes(b"half")
    (out / "x" / "2.mp4").write_bytes(whole[out / "x" / "2.mp4"][:-100])
    journal = (out / "prepared.csv").read_bytes()
    assert journal.splitlines()[-1].startswith(b"y/4.mp4")
    (out / "prepared.csv").write_bytes(journal[: journal.rindex(b"y/4.mp4") + 12])
    before = states(out)
    assert prepare(clips, out) == 0
    assert {path: path.read_bytes() for path in out.rglob("*.mp4")} == whole
    redone = {name for name, state in states(out).items() if before.get(name) != state and name.endswith(".mp4")}
    assert redone == {"x/2.mp4", "y/4.mp4"}
    lines = (out / "prepared.csv").read_text(encoding="utf-8").splitlines()
    assert [line.partition(",")[0] for line in lines[-2:]] == ["x/2.avi", "y/4.mp4"]
    assert len({line.count(",") for line in lines}) == 1


@pytest.mark.usefixtures("here")
def test_a_changed_source_is_prepared_again_and_a_spoiled_one_leaves_nothing(clips: Path, tmp_path: Path) -> None:
    assert prepare(clips, tmp_path / "out") == 0
    write_video(clips / "x" / "1.mp4", bright=True, seed=9, frames=20)
    (clips / "y" / "3.mp4").write_bytes(b"no longer a video")
    before = states(tmp_path / "out")
    assert prepare(clips, tmp_path / "out") == 3
    assert set(reasons(tmp_path / "out")) == {"y/3.mp4"}
    after = states(tmp_path / "out")
    assert "y/3.mp4" not in after
    assert [name for name in after if name.endswith("4") and after[name] != before[name]] == ["x/1.mp4"]


@pytest.mark.usefixtures("here")
def test_other_settings_want_another_folder(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(clips, out) == 0
    before = states(out)
    for flags in (("--crf", "30"), ("--crf", "30", "--dry-run")):
        assert prepare(clips, out, *flags) == 2
        assert "crf 21 instead of 30" in capsys.readouterr().err
    (out / "settings.json").write_text("{", encoding="utf-8")
    assert prepare(clips, out) == 2
    assert "settings.json: is damaged" in capsys.readouterr().err
    assert {name: state for name, state in states(out).items() if name != "settings.json"} == {
        name: state for name, state in before.items() if name != "settings.json"
    }
    with pytest.raises(SystemExit, match="2"):
        prepare(clips, out, "--preset", "fastest")


# What goes wrong ------------------------------------------------------------------------------------------------


def hang_or_prepare(task: tool.Task) -> tool.Done:
    """Like `prepare`, but one name hangs with half an output, and holds the interpreter lock."""
    if "hang" in task.source:
        part = prepared_folder.part_of(task.out / task.output)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half")
        ctypes.PyDLL(None).sleep(1000)
    return tool.prepare(task)


def test_one_that_hangs_costs_only_itself(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clips / "x" / "1.mp4").rename(clips / "x" / "hang.mp4")
    monkeypatch.setattr(tool, "attempt", hang_or_prepare)
    # Forked: a process that has to import everything takes seconds.
    monkeypatch.setattr(tool, "watched_map", partial(_map, tool.watched_map, {"method": "fork"}))
    assert prepare(clips, tmp_path / "out", "--timeout-seconds", "4") == 3
    assert reasons(tmp_path / "out") == {"x/hang.mp4": "decoding took longer than 4 s"}
    made = {name for name in states(tmp_path / "out") if "mp4" in name}
    assert made == {"x/2.mp4", "y/3.mp4", "y/4.mp4"}


@pytest.mark.usefixtures("here")
def test_a_disk_that_fills_up_stops_the_work_before_it_is_full(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter((100 * 2**30, 6 * 2**30, 6 * 2**30, 4 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(left)))
    assert tool.main([str(clips), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "less than 5 GiB of disk are free. Make room, or lower --keep-free-gib" in told
    assert {name for name in states(tmp_path / "out") if "mp4" in name} == {"x/1.mp4", "x/2.mp4"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**30))
    assert tool.main([str(clips), "--out", str(tmp_path / "out")]) == 0
    assert "4 videos, 2 of them done; 2 to do" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_dry_run_writes_nothing(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(clips, tmp_path / "out", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["x/1.mp4 -> x/1.mp4", "x/2.avi -> x/2.mp4"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["clips", "clips/small", "."])
def test_outputs_never_lie_among_their_sources(clips: Path, tmp_path: Path, out: str) -> None:
    assert prepare(clips, tmp_path / out) == 2
    assert not [*tmp_path.rglob("settings.json")]


@pytest.mark.usefixtures("here")
def test_names_that_are_no_text(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, spoiled = (clips / "x" / name.decode("utf-8", "surrogateescape") for name in (b"\xff.mp4", b"\xfe,\n.mp4"))
    (clips / "x" / "1.mp4").rename(good)
    spoiled.write_bytes(b"no video")
    assert prepare(clips, tmp_path / "out", "--dry-run") == 0
    assert prepare(clips, tmp_path / "out") == 3
    assert (tmp_path / "out" / "x" / good.name).is_file()
    assert b"\xfe,\n.mp4" in (tmp_path / "out" / "bad.csv").read_bytes()
    capsys.readouterr()
    assert prepare(clips, tmp_path / "out") == 3
    assert "5 videos, 4 of them done" in capsys.readouterr().err


# Names and tables -----------------------------------------------------------------------------------------------


def test_names_that_would_collide_stay_apart() -> None:
    outputs = prepared_folder.outputs_of(["x/a.avi", "x/a.mkv", "x/a.mkv.mp4", "x/a.mp4", "x/b.avi", "x/b.mkv", "y/a"])
    assert outputs == {
        "x/a.mp4": "x/a.mp4",
        "x/a.mkv.mp4": "x/a.mkv.mp4",
        "x/a.avi": "x/a.avi.mp4",
        "x/a.mkv": "x/a.mkv.mp4.mp4",
        "x/b.avi": "x/b.mp4",
        "x/b.mkv": "x/b.mkv.mp4",
        "y/a": "y/a.mp4",
    }


@pytest.mark.usefixtures("here")
def test_videos_that_differ_in_their_suffix_are_both_prepared(clips: Path, tmp_path: Path) -> None:
    write_video(clips / "x" / "2.mkv", bright=True, seed=5, frames=7)
    assert prepare(clips, tmp_path / "out") == 0
    counts = {}
    for name in ("2.mp4", "2.mkv.mp4"):
        with open_source(tmp_path / "out" / "x" / name, data=DataConfig()) as output:
            counts[name] = len(output.positions)
    assert counts == {"2.mp4": 12, "2.mkv.mp4": 7}
    # One that comes later may take another's name: both are done anew.
    write_video(clips / "x" / "2.mp4", bright=True, seed=6, frames=9)
    assert prepare(clips, tmp_path / "out") == 0
    for name, count in (("2.mp4", 9), ("2.avi.mp4", 12), ("2.mkv.mp4", 7)):
        with open_source(tmp_path / "out" / "x" / name, data=DataConfig()) as output:
            assert len(output.positions) == count


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["prepared.csv", "bad.csv"])
def test_a_manifest_does_not_overwrite_the_tables_of_the_tool(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (clips / name).write_text("source,label\n")
    assert prepare(clips / name, tmp_path / "out") == 2
    assert "another name" in capsys.readouterr().err


def test_a_manifest_is_written_for_the_outputs(clips: Path, tmp_path: Path) -> None:
    rows = [
        ("x/1.mp4", "on", "train", "p1", "0.25", "0.75"),
        ("x/1.mp4", "off", "train", "p1", "0.5", "1.0"),
        ("x/2.avi", "on", "val", "", "", ""),
        ("y/3.mp4", "off", "", "p2", "0.0", "0.125"),
        ("y/gone.mp4", "off", "test", "p3", "", ""),
        ("y/still.png", "off", "test", "p4", "", ""),
        ("y/frames", "off", "test", "p5", "", ""),
    ]
    (clips / "y" / "still.png").write_bytes(b"\x89PNG")
    (clips / "y" / "frames").mkdir()
    with (clips / "words.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("source", "label", "split", "group", "start_seconds", "end_seconds"), *rows])
    out = tmp_path / "out"
    assert prepare(clips / "words.csv", out, "--short-side", "16") == 3
    assert reasons(out) == {
        "y/frames": "is a folder; only video files are prepared",
        "y/gone.mp4": "no such file",
        "y/still.png": "is a file of kind image, expected video",
    }
    with (out / "words.csv").open(encoding="utf-8", newline="") as file:
        written = [tuple(line.values()) for line in csv.DictReader(file)]
    assert written == [rows[0], rows[1], ("x/2.mp4", "on", "val", "x/2.avi", "", ""), rows[3]]
    corpus = open_corpus(DataConfig(dataset=str(out / "words.csv"), val_fraction=0, test_fraction=0))
    assert (corpus.kind, corpus.classes, corpus.missing) == ("video", ("off", "on"), 0)
    data = DataConfig(num_frames=4)
    for row in range(4):
        window = corpus.manifest.window(row)
        with (
            open_source(clips / rows[row][0], data=data) as source,
            open_source(corpus.manifest.path(row), data=data) as made,
        ):
            assert made.extent == pytest.approx(source.extent, abs=1e-4)
            before, after = (read_clip(one, data=data, window=window) for one in (source, made))
        np.testing.assert_allclose(after.positions, before.positions, rtol=0, atol=1e-4)
        assert after.frames.shape[1:] == (3, 16, 24) and before.frames.shape[1:] == (3, 32, 48)


@pytest.mark.usefixtures("here")
def test_tables_beside_the_videos_come_along_but_not_those_of_an_earlier_call(clips: Path, tmp_path: Path) -> None:
    (clips / "annotations").mkdir()
    (clips / "annotations" / "train.csv").write_text("label,youtube_id\n", encoding="utf-8")
    assert prepare(clips, tmp_path / "a") == 0
    assert prepare(tmp_path / "a", tmp_path / "b", "--short-side", "16") == 0
    assert (tmp_path / "b" / "annotations" / "train.csv").read_text(encoding="utf-8") == "label,youtube_id\n"
    lines = (tmp_path / "b" / "prepared.csv").read_text(encoding="utf-8").splitlines()
    assert [line.rsplit(",", 2)[1] for line in lines] == ["height", *["16"] * 4]
    shutil.rmtree(tmp_path / "b" / "annotations")  # would be a class
    corpus = open_corpus(DataConfig(dataset=str(tmp_path / "b")))
    assert (corpus.classes, len(corpus.manifest)) == (("x", "y"), 4)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "name", ["../out.mp4", "/tmp/a.mp4", "x/../../out.mp4", "C:\\a.mp4", "link/1.mp4", "x/link.mp4"]
)
def test_names_of_a_manifest_never_leave_its_folder_nor_the_output(clips: Path, tmp_path: Path, name: str) -> None:
    write_video(tmp_path / "out.mp4", bright=True, seed=1)
    (tmp_path / "beside").mkdir()
    write_video(tmp_path / "beside" / "1.mp4", bright=True, seed=1)
    (clips / "link").symlink_to(tmp_path / "beside")
    (clips / "x" / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (clips / "set.csv").write_text(f"source,label\nx/1.mp4,a\n{name},b\n", encoding="utf-8")
    before = states(tmp_path)
    assert prepare(clips / "set.csv", tmp_path / "made" / "here") == 2
    assert states(tmp_path) == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", [".hidden/.1.mp4", "x//./1.mp4", "-rf.mp4", "a b'%d.mp4", "prepared.csv/1.mp4"])
def test_odd_names_of_a_manifest_stay_inside(clips: Path, tmp_path: Path, name: str) -> None:
    (clips / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(clips / "y" / "3.mp4", clips / name)
    (clips / "set.csv").write_text(f"source,label\n{name},a\ny/4.mp4,b\n", encoding="utf-8")
    before = states(clips)
    code = prepare(clips / "set.csv", tmp_path / "made" / "here")
    assert states(clips) == before
    assert not [path for path in (tmp_path / "made").iterdir() if path.name != "here"]
    assert code == (2 if name.startswith("prepared.csv") else 0)
