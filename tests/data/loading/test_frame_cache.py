import itertools
import multiprocessing
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.command_line import QUICK, videogru, write_video
from videogru.checkpoint.model_file import read_model
from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.clips.transforms import prepare_clip
from videogru.data.loading import frame_cache as cache_module
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.loading.frame_cache import FrameCache
from videogru.data.manifests.corpus import open_corpus
from videogru.data.readers.open import open_source
from videogru.errors import ConfigError, SourceError

COUNT = 12  # frames of a made video


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", bright=True, seed=0, frames=COUNT)
    return tmp_path / "a.mp4"


def settings(folder: Path, form: str = "raw", **changes: object) -> DataConfig:
    where = {"cache": form, "cache_dir": folder / "cache"}
    return DataConfig(**{"frame_size": 24, "num_frames": 5, **where, **changes}).for_kind("video")


def entries(data: DataConfig) -> list[Path]:
    assert data.cache_dir is not None
    return sorted(data.cache_dir.glob("*/*"))


def used(data: DataConfig) -> int:
    assert data.cache_dir is not None
    return int((data.cache_dir / "used_bytes").read_text())


def all_frames(data: DataConfig, path: Path) -> tuple[torch.Tensor, str]:
    with FrameCache(data).open(path) as source:
        whole = read_clip(source, data=data.model_copy(update={"sampling": "all"}))
        frames = prepare_clip(whole, data=data, pixel_aspect=source.pixel_aspect).frames
        cached = str(source.details["access"])
    with open_source(path, data=data, kind="video") as source:
        whole = read_clip(source, data=data.model_copy(update={"sampling": "all"}))
        expected = prepare_clip(whole, data=data, pixel_aspect=source.pixel_aspect).frames
    assert torch.equal(frames, expected) or data.cache == "jpeg"
    return frames, cached


@pytest.mark.parametrize(("fit", "channels"), [("crop", 3), ("pad", 1), ("stretch", 3)])
def test_raw_is_the_video_bit_by_bit(tmp_path: Path, video: Path, fit: str, channels: int) -> None:
    data = settings(tmp_path, fit=fit, channels=channels)
    frames, access = all_frames(data, video)
    assert access == "cached as raw"
    assert frames.shape == (COUNT, channels, 24, 24)
    assert all_frames(data, video)[1] == "cached as raw"
    with FrameCache(data).open(video) as source, open_source(video, data=data) as file:
        assert source.positions.tolist() == file.positions.tolist()
        assert (source.extent, source.unit, source.path) == (file.extent, file.unit, file.path)
        clip = read_clip(source, data=data)
        assert prepare_clip(clip, data=data, pixel_aspect=source.pixel_aspect).frames.equal(clip.frames)
    assert used(data) == sum(path.stat().st_size for path in entries(data))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_near(tmp_path: Path, channels: int) -> None:
    from tests.data.readers.video.test_video import make_video

    make_video(tmp_path / "b.mp4", range(0, 400, 40), rotation=90)
    data = settings(tmp_path, "jpeg", channels=channels)
    near, access = all_frames(data, tmp_path / "b.mp4")
    exact, _ = all_frames(settings(tmp_path, channels=channels), tmp_path / "b.mp4")
    assert access == "cached as jpeg"
    error = (near.float() - exact.float()).square().mean().item()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 38
    assert len(entries(data)) == 2  # another form, another entry


def test_what_frames_depend_on_names_the_entry(tmp_path: Path, video: Path) -> None:
    for change in ({}, {"frame_size": 16}, {"fit": "pad"}, {"channels": 1}, {"decoder": "pyav"}, {"num_frames": 3}):
        all_frames(settings(tmp_path, **change), video)
    assert len(entries(settings(tmp_path))) == 5  # the number of frames of a clip changes nothing
    write_video(video, bright=False, seed=1, frames=COUNT)
    assert all_frames(settings(tmp_path), video)[1] == "cached as raw"
    assert len(entries(settings(tmp_path))) == 6


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_damage_is_seen_and_mended(tmp_path: Path, video: Path, form: str) -> None:
    data = settings(tmp_path, form)
    good, _ = all_frames(data, video)
    (entry,) = entries(data)
    whole = entry.read_bytes()
    rng = np.random.default_rng(0)
    for place in [0, 9, 14, 20, 40, len(whole) - 1, *rng.integers(0, len(whole), 40).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        entry.write_bytes(damaged)
        first, _ = all_frames(data, video)  # from the video, if a frame is damaged
        again, access = all_frames(data, video)
        assert access == f"cached as {form}"
        assert torch.equal(again, good)
        assert torch.equal(first, good) or form == "jpeg"
        assert entry.read_bytes() == whole, place
    for size in (0, 5, 30, len(whole) // 2, len(whole) - 1):
        entry.write_bytes(whole[:size])
        assert all_frames(data, video)[1] == f"cached as {form}"
    assert used(data) <= len(whole)


def test_a_file_cut_short_while_open_is_read_from_the_video(tmp_path: Path, video: Path) -> None:
    data = settings(tmp_path)
    good, _ = all_frames(data, video)
    with FrameCache(data).open(video) as source:
        os.truncate(entries(data)[0], 3000)
        assert torch.equal(source.read([3, COUNT - 1]), good[[3, COUNT - 1]])
    assert not entries(data)


def test_the_bound_holds_and_nothing_is_thrown_out(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.mp4" for number in range(5)]
    for number, path in enumerate(paths):
        write_video(path, bright=True, seed=number, frames=COUNT)
    all_frames(settings(tmp_path), paths[0])
    size = entries(settings(tmp_path))[0].stat().st_size
    for form in ("raw", "jpeg"):
        shutil.rmtree(tmp_path / "cache")
        data = settings(tmp_path, form, cache_gib=2.5 * size / 2**30)
        ways = [all_frames(data, path)[1] for path in paths]
        assert ways[0] == f"cached as {form}"
        assert sum(path.stat().st_size for path in entries(data)) == used(data) <= 2.5 * size
    assert ways[-1] == "by seeking" or len(entries(data)) == 5
    raw = settings(tmp_path, cache_gib=2.5 * size / 2**30)
    shutil.rmtree(tmp_path / "cache")
    assert [all_frames(raw, path)[1] for path in paths] == ["cached as raw"] * 2 + ["by seeking"] * 3
    assert [all_frames(raw, path)[1] for path in paths] == ["cached as raw"] * 2 + ["by seeking"] * 3


def test_leftovers_of_killed_processes_go(tmp_path: Path, video: Path) -> None:
    data = settings(tmp_path)
    (tmp_path / "cache" / "ab").mkdir(parents=True)
    old, fresh = (tmp_path / "cache" / "ab" / f"{name}.1-1.part" for name in ("old", "fresh"))
    for part in (old, fresh):
        part.write_bytes(b"x" * 1000)
    os.utime(old, (time.time() - 9999,) * 2)
    (tmp_path / "cache" / "used_bytes").write_text("123456789")
    all_frames(data, video)
    assert (old.exists(), fresh.exists()) == (False, True)
    assert used(data) == sum(path.stat().st_size for path in entries(data))


def test_long_videos_are_not_cached(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_ENTRY_BYTES", COUNT * 3 * 24 * 24 - 1)
    assert all_frames(settings(tmp_path), video)[1] == "by seeking"
    assert not entries(settings(tmp_path))


def test_what_cannot_be_read_whole_is_read_as_without(tmp_path: Path, video: Path) -> None:
    data = settings(tmp_path)
    content = video.read_bytes()
    at = content.index(b"mdat")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content[: at + 4] + bytes(3000) + content[at + 3004 :])
    cache = FrameCache(data)
    for _ in range(2):
        answers = []
        for opener in (cache.open, lambda path: open_source(path, data=data, kind="video")):
            try:
                with opener(broken) as source:
                    answers.append(read_clip(source, data=data).frames.tolist())
            except SourceError as error:
                answers.append(error.what)
        assert answers[0] == answers[1]
    assert not entries(data)
    with pytest.raises(SourceError, match="no such file"):
        cache.open(tmp_path / "none.mp4")


def test_a_full_disk_is_told_and_training_goes_on(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write", full)
    with pytest.warns(UserWarning, match="no more frames are cached in .*No space left"):
        assert all_frames(settings(tmp_path), video)[1] == "by seeking"
    assert not entries(settings(tmp_path))


def _fill(data: DataConfig, paths: list[Path], answers: "multiprocessing.Queue[bool]") -> None:
    torch.set_num_threads(1)
    cache = FrameCache(data)
    right = True
    for path in paths:
        with cache.open(path) as source, open_source(path, data=data, kind="video") as file:
            expected = prepare_clip(read_clip(file, data=data), data=data, pixel_aspect=file.pixel_aspect)
            right &= torch.equal(read_clip(source, data=data).frames, expected.frames)
    answers.put(right)


def test_many_processes_fill_one_folder(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.mp4" for number in range(6)]
    for number, path in enumerate(paths):
        write_video(path, bright=True, seed=number, frames=COUNT)
    data = settings(tmp_path)
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[bool] = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, from Python 3.12 on
        processes = [context.Process(target=_fill, args=(data, paths, answers)) for _ in range(4)]
        for process in processes:
            process.start()
    assert all(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert len(entries(data)) == 6
    assert used(data) == sum(path.stat().st_size for path in entries(data))


def test_training_with_raw_frames_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for label, number in itertools.product("ab", range(6)):
        (tmp_path / "clips" / label).mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "clips" / label / f"{number}.mp4", bright=label == "a", seed=number)
    size = ("--set", "data.frame_size=24", "--set", "data.num_frames=4", "--batch-size", "4", "--epochs", "2")
    weights = []
    for number, cache in enumerate(("none", "raw")):
        done = videogru(
            *("train", "--dataset", "clips", *QUICK, *size, "--out", f"run{number}"),
            *("--set", f"data.cache={cache}", "--set", "data.cache_dir=frames"),
        )
        assert done.code == 0, done.err
        classifier, card = read_model(tmp_path / f"run{number}" / "model.safetensors")
        assert (card.data.cache, card.data.cache_dir) == ("none", None)
        weights.append(torch.cat([tensor.flatten() for tensor in classifier.state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert len(list((tmp_path / "frames").glob("*/*"))) == 12
    for path in list((tmp_path / "frames").glob("*/*")):
        path.unlink()
    done = videogru("infer", "clips/a/0.mp4", "--model", "run1")
    assert done.code == 0, done.err
    assert not list((tmp_path / "frames").glob("*/*"))


def test_windows_share_an_entry_and_crops_are_not_cached(tmp_path: Path, video: Path) -> None:
    (tmp_path / "set.csv").write_text(
        "source,label,split,start_seconds,end_seconds\na.mp4,x,train,0,0.5\na.mp4,y,train,0.5,1\n"
    )
    data = settings(tmp_path, dataset=str(tmp_path / "set.csv"))
    corpus = open_corpus(data.model_copy(update={"val_fraction": 0.0, "test_fraction": 0.0}))
    plain = data.model_copy(update={"cache": "none"})
    for training, views in ((True, (1, 1)), (False, (2, 1)), (False, (1, 3))):
        one, other = (
            ClipDataset(corpus, data=each, training=training, views=views).__getitems__([(3, 0), (3, 1)]).batch
            for each in (plain, data)
        )
        assert one is not None
        assert other is not None
        assert torch.equal(one.frames, other.frames)
    assert len(entries(data)) == 1


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.cache=raw is not for images"):
        DataConfig(cache="raw").for_kind("image")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be cached there"):
        FrameCache(settings(tmp_path, cache_dir=tmp_path / "file"))
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "odd.mp4").write_bytes((tmp_path / "x.png").read_bytes()[:50])
    with pytest.raises(SourceError):
        FrameCache(settings(tmp_path)).open(tmp_path / "odd.mp4")
