"""The benchmark of loading: the same clips for all, ratios round by round, and mistakes that get one line."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.readers.video.test_video import make_video, numbers
from tools.benchmarks import bench_loading
from videogru.config import DataConfig
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import DataError

COUNT = 40


@pytest.fixture(autouse=True)
def few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loading, "FRAMES", 4)


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "videos"
    folder.mkdir()
    options = {"g": "6", "bf": "2"}
    return [make_video(folder / f"{k}.mp4", range(COUNT), options=options, base=Fraction(1, 25)) for k in range(2)]


def test_every_contender_reads_the_drawn_frames(videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gray frames show their numbers; the transforms of the others normalize, ours do not."""
    wanted = bench_loading.wanted_frames(videos)
    reads: list[list[int]] = []
    original = PyavVideo.read
    monkeypatch.setattr(
        PyavVideo, "read", lambda self, indices: (reads.append(list(indices)), original(self, indices))[1]
    )
    data = DataConfig(frame_size=32, num_frames=bench_loading.FRAMES).for_kind("video")
    mine = bench_loading.ours(videos, data)
    others = [bench_loading.by_pyav(videos, 32)]
    if bench_loading.importlib.util.find_spec("decord"):
        others += [bench_loading.by_decord(videos, 32, pictures=pictures) for pictures in (False, True)]
    for video, epoch in ((0, 0), (1, 3)):
        indices = wanted(video, epoch)
        clip = mine(video, epoch)
        assert reads[-1] == indices
        for other in others:
            theirs = other(video, epoch)
            mean, sd = (torch.tensor(values).view(3, 1, 1) for values in (bench_loading.MEAN, bench_loading.SD))
            assert theirs.shape == clip.shape
            assert float(((theirs * sd + mean) * 255 - clip).abs().mean()) < 4  # decoders round colors differently
    with PyavVideo(videos[1]) as video:
        assert numbers(video.read(wanted(1, 3))) == wanted(1, 3)
    assert wanted(0, 0) != wanted(0, 1)


def test_first_openings_look_through_the_packets_each_time(videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    original = PyavVideo._make_index
    monkeypatch.setattr(PyavVideo, "_make_index", lambda self: (seen.append(self.path), original(self))[1])
    data = DataConfig(frame_size=32, num_frames=bench_loading.FRAMES).for_kind("video")
    kept = bench_loading.ours(videos, data)
    for epoch in range(3):
        kept(0, epoch)
    assert len(seen) == 1
    for epoch in range(3):
        bench_loading.forgetful(kept)(0, epoch)
    assert len(seen) == 4


def test_ratios_are_taken_round_by_round() -> None:
    rates = {"videogru, files": [10.0, 40.0, 30.0], "a": [5.0, 10.0, 30.0], "b": [1.0, 1.0, 99.0]}
    assert bench_loading.best_other(rates) == "a"
    group = {"title": "t", "size": 8, "videos": 1, "rates": rates, "notes": {"torchcodec": "not run: not installed"}}
    facts = bench_loading.machine(["python", "-m", "tools.benchmarks.bench_loading"])
    text = bench_loading.report({"rounds": 3, "groups": [group], "gops": []}, facts)
    assert "| videogru, files | 30.0 (10.0–40.0) | 2.00 (1.00–4.00) |" in text
    assert "torchcodec: not run: not installed." in text
    assert "| files, t, 8 pixels | 4 | 10 | 34 |" in text


def test_it_writes_both_files(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_loading, "by_torchcodec", lambda *_, **__: (_ for _ in ()).throw(ImportError("absent")))
    words = ["--videos", str(videos[0].parent), "--limit=1", "--sizes=16", "--epochs=1", "--rounds=2"]
    assert bench_loading.main([*words, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "loading.md").read_text()
    assert text in capsys.readouterr().out
    assert "torchcodec: not run: absent." in text and str(tmp_path) not in text
    group = json.loads((tmp_path / "out" / "loading.json").read_text())["groups"][0]
    assert all(len(values) == 2 and min(values) > 0 for values in group["rates"].values())
    assert {"videogru, files", "videogru, files, first opening", "PyAV in order"} <= set(group["rates"])


@pytest.mark.parametrize(
    "words", [["--rounds=0"], ["--epochs=0"], ["--limit=0"], ["--sizes=3"], ["--sizes=112,"], ["--sizes=a"]]
)
def test_bad_numbers_get_one_line(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_loading.main(["--videos", str(tmp_path), "--out", str(tmp_path), *words])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "at least 1" in err and err.count("\n") == 1


def test_a_folder_without_videos_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    assert bench_loading.main(["--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no video" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_video_that_cannot_be_read_stops_it(videos: list[Path]) -> None:
    videos[0].write_bytes(b"no video")
    data = DataConfig(frame_size=16, num_frames=bench_loading.FRAMES).for_kind("video")
    with pytest.raises(DataError, match="cannot be read"):
        bench_loading.ours(videos, data)(0, 0)


def test_videos_are_chosen_evenly(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.mp4").touch()
    assert [path.stem for path in bench_loading.videos_in(tmp_path, 3)] == ["0", "4", "8"]
    assert len(bench_loading.videos_in(tmp_path, 99)) == 9
    assert np.unique([path.name for path in bench_loading.videos_in(tmp_path, 5)]).size == 5
