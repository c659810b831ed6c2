"""Folders of numbered images as videos: as a source, in every layout, from the command line, and with bad input."""

import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.command_line import QUICK, videogru
from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.loading.clip_dataset import ClipDataset
from videogru.data.manifests.corpus import open_corpus
from videogru.data.readers.file_types import media_files, numbered_images
from videogru.data.readers.open import open_source
from videogru.data.readers.source import FrameSource
from videogru.data.readers.video import frame_folder
from videogru.data.readers.video.frame_folder import FrameFolder, is_frame_folder
from videogru.errors import DataError, SourceError
from videogru.workflows import predict as answers


def write_frames(
    folder: Path, numbers: list[int], name: str = "img_{:05d}.png", size: tuple[int, int] = (12, 8)
) -> Path:
    """Frame k is gray k."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", size, (number % 256,) * 3).save(folder / name.format(number))
    return folder


def grays(frames: torch.Tensor) -> list[int]:
    return frames[:, 0, 0, 0].tolist()


# A source ---------------------------------------------------------------------------------------------------------


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", [11, 2, 10, 9, 1], name="img_{}.png")
    with open_source(folder, data=DataConfig(folder_fps=10.0)) as source:
        assert isinstance(source, FrameFolder) and isinstance(source, FrameSource)
        assert (source.kind, source.unit, source.pixel_aspect) == ("video", "seconds", 1.0)
        # 3 to 8 are lost: 2 goes on showing.
        np.testing.assert_allclose(source.positions, [0.0, 0.1, 0.8, 0.9, 1.0])
        assert source.extent == (0.0, pytest.approx(1.1))
        clip = source.read(range(5))
        assert clip.dtype == torch.uint8 and clip.shape == (5, 3, 8, 12)
        assert grays(clip) == [1, 2, 9, 10, 11]
        assert grays(source.read([1, 4])) == [2, 11]
        assert source.details["missing_numbers"] == 6 and source.details["frames"] == 5


def test_clips_are_sampled_by_time(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", [*range(10), *range(60, 70)])
    with open_source(folder, data=DataConfig()) as source:
        # Centers of 6 segments of 2.8 s: 0.233, 0.7, ..., 2.567 s; numbers 5, 9 (while 10 to 59 are missing) and 64.
        clip = read_clip(source, data=DataConfig(num_frames=6))
        assert grays(clip.frames) == [5, 9, 64]
        np.testing.assert_allclose(clip.positions, [0.2, 0.36, 2.56])
        window = read_clip(source, data=DataConfig(num_frames=100), window=(0.1, 0.2))
        assert grays(window.frames) == [2, 3, 4]
        with pytest.raises(SourceError, match=r"nothing lies between 3 and 4 seconds(?s:.*)from 0 to 2.8"):
            read_clip(source, data=DataConfig(), window=(3.0, 4.0))


def test_only_the_chosen_frames_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_frames(tmp_path / "clip", list(range(30)))
    opened: list[str] = []
    original = frame_folder.open_image
    monkeypatch.setattr(frame_folder, "open_image", lambda path: opened.append(path.name) or original(path))
    with open_source(folder, data=DataConfig()) as source:
        assert opened == []
        read_clip(source, data=DataConfig(num_frames=4))
    assert opened == [f"img_000{number}.png" for number in ("03", "11", "18", "26")]


def test_frames_are_read_as_stills_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    for number in (1, 2):
        turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, 1)))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        turned.save(tmp_path / f"{number}.png", exif=exif)
    with FrameFolder(tmp_path, fps=25.0) as source:
        assert np.array_equal(source.read([0, 1])[1].permute(1, 2, 0), pixels)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
        with pytest.raises(SourceError, match=r"1\.png.*larger than 60 pixels"):
            source.read([0])


@pytest.mark.parametrize("indices", [[], [3, 3], [4, 2], [-1, 2], [5]])
def test_bad_indices_are_refused(tmp_path: Path, indices: list[int]) -> None:
    with FrameFolder(write_frames(tmp_path, list(range(5))), fps=25.0) as source, pytest.raises(ValueError):
        source.read(indices)


def test_close_twice_and_read_after(tmp_path: Path) -> None:
    source = FrameFolder(write_frames(tmp_path, [1, 2]), fps=25.0)
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read([0])


# Bad folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "at least 2 numbered images"),
        (["notes.txt"], "at least 2 numbered images"),
        (["img_1.jpg"], "at least 2 numbered images, not only img_1.jpg"),
        (["img_1.jpg", "img_2.jpg", "cover.jpg"], "cover.jpg is no image with a number at the end"),
        (["img_1.jpg", "img_2.png"], "img_1.jpg and img_2.png are not of one pattern"),
        (["img_1.jpg", "flow_1.jpg"], "flow_1.jpg.* are not of one pattern"),
        (["img_1.jpg", "img_01.jpg"], "have the same number"),
        (["img_1.jpg", "img_2.jpg", "clip.mp4"], "clip.mp4 is no image"),
        (["img_1.jpg", "img_2.jpg", "more/img_1.jpg"], "its folder more holds media"),
        (["img_1.jpg", f"img_{9 * 10**17}.jpg", f"img_{9 * 10**17 + 1}.jpg"], "too far apart"),
    ],
)
def test_folders_that_are_no_frame_folders(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / "clip" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clip" / name).write_bytes(b"x")
    (tmp_path / "clip").mkdir(exist_ok=True)
    assert not is_frame_folder(tmp_path / "clip")
    with pytest.raises(SourceError, match="is a folder") as caught:
        open_source(tmp_path / "clip", data=DataConfig())
    assert any(re.search(words, text) for text in (caught.value.what, caught.value.hint or ""))
    assert caught.value.hint and str(tmp_path / "clip") in str(caught.value)


def test_other_files_suffixes_in_capitals_and_hidden_ones_do_not_matter(tmp_path: Path) -> None:
    write_frames(tmp_path, [1, 2])
    write_frames(tmp_path, [3], name="img_{:05d}.PNG")
    for name in ("Thumbs.db", ".img_00001.png.swp", "notes.txt", ".DS_Store", "._img_00001.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with FrameFolder(tmp_path, fps=25.0) as source:
        assert grays(source.read([0, 1, 2])) == [1, 2, 3]


def test_frames_of_other_size_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    folder = write_frames(tmp_path, [1, 2, 3, 4, 5])
    write_frames(tmp_path, [4], size=(20, 8))
    (tmp_path / "img_00005.png").write_bytes((tmp_path / "img_00001.png").read_bytes()[:40])
    with FrameFolder(folder, fps=25.0) as source:
        assert grays(source.read([0, 1, 2])) == [1, 2, 3]
        with pytest.raises(SourceError, match=r"img_00002\.png has 12x8 pixels, img_00004\.png 20x8"):
            source.read([1, 3])
        with pytest.raises(SourceError, match=r"img_00005\.png: cannot be read as an image"):
            source.read([0, 4])
        (tmp_path / "img_00003.png").unlink()
        with pytest.raises(SourceError, match=r"img_00003\.png: cannot be read"):
            source.read([2])


def test_a_frame_that_is_animated_is_refused(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (12, 8), (k, 0, 0)) for k in (0, 200)]
    for number in (1, 2):
        pages[0].save(tmp_path / f"{number}.webp", save_all=True, append_images=pages[1:], lossless=True)
    with FrameFolder(tmp_path, fps=25.0) as source, pytest.raises(SourceError, match=r"1\.webp: holds several images"):
        source.read([0, 1])


def test_a_clip_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_folder, "MAX_CLIP_BYTES", 2 * 12 * 8 * 3)
    with FrameFolder(write_frames(tmp_path, [1, 2, 3]), fps=25.0) as source:
        assert len(source.read([0, 1])) == 2
        with pytest.raises(SourceError, match="3 frames of 12x8"):
            source.read([0, 1, 2])


@pytest.mark.slow
def test_a_hundred_thousand_frames_open_in_a_moment(tmp_path: Path) -> None:
    for number in range(100_000):
        (tmp_path / f"img_{number}.jpg").touch()
    started = time.process_time()
    with FrameFolder(tmp_path, fps=25.0) as source:
        assert len(source.positions) == 100_000
    assert time.process_time() - started < 3


def test_numbers_are_ordered_and_counted() -> None:
    found = numbered_images(["b10.jpg", "b9.jpg", "x.txt", "b0011.jpg"])
    assert found.names == ("b9.jpg", "b10.jpg", "b0011.jpg")
    assert found.numbers.tolist() == [9, 10, 11]


# Layouts ----------------------------------------------------------------------------------------------------------


def class_folders(root: Path, clips: int = 4) -> Path:
    for label, start in (("walk", 0), ("run", 100)):
        for clip in range(clips):
            write_frames(root / label / f"clip{clip}", list(range(start + 10 * clip, start + 10 * clip + 6)))
    return root


def test_folders_in_class_folders_are_videos(tmp_path: Path) -> None:
    corpus = open_corpus(DataConfig(dataset=str(class_folders(tmp_path / "data"))))
    assert (corpus.kind, corpus.classes, len(corpus.manifest)) == ("video", ("run", "walk"), 8)
    assert sorted(corpus.manifest.sources.tolist())[:2] == ["run/clip0", "run/clip1"]
    assert any("25 frames per second" in note for note in corpus.notes)
    loaded = ClipDataset(corpus, data=DataConfig(frame_size=8, num_frames=6).for_kind("video")).__getitems__([(0, 0)])
    assert loaded.batch is not None and loaded.batch.frames.shape == (1, 6, 3, 8, 8)


def test_numbered_images_in_class_folders_stay_stills(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        write_frames(tmp_path / label, list(range(6)))
        write_frames(tmp_path / "split" / "train" / label, list(range(6)))
    for root in (tmp_path / "split", tmp_path):
        if root == tmp_path:
            shutil.rmtree(tmp_path / "split")
        corpus = open_corpus(DataConfig(dataset=str(root)))
        assert (corpus.kind, len(corpus.manifest)) == ("image", 12)


def test_unnumbered_images_deeper_down_stay_stills(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for name in ("a", "b", "c"):
            write_frames(tmp_path / label / "more", [0], name=f"{name}.png")
    assert open_corpus(DataConfig(dataset=str(tmp_path))).kind == "image"


def test_bad_clip_folders_beside_good_ones_get_their_error(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    write_frames(root / "run" / "one", [7])
    write_frames(root / "run" / "mixed", [1, 2])
    write_frames(root / "run" / "mixed", [3], name="other_{}.png")
    corpus = open_corpus(DataConfig(dataset=str(root)))
    assert Counter(corpus.manifest.labels.tolist()) == {0: 6, 1: 4}
    dataset = ClipDataset(corpus, data=DataConfig(frame_size=8, num_frames=6).for_kind("video"))
    loaded = dataset.__getitems__([(0, row) for row in range(10)])
    errors = {str(corpus.manifest.sources[row]): reason for row, reason in loaded.failures}
    assert set(errors) == {"run/one", "run/mixed"}
    assert "at least 2 numbered images" in errors["run/one"] and "not of one pattern" in errors["run/mixed"]
    # Stills in the class folder itself are another kind.
    write_frames(root / "run", [5])
    with pytest.raises(DataError, match="one data set, one kind"):
        open_corpus(DataConfig(dataset=str(root)))


def test_a_folder_named_like_a_video(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for clip in range(3):
            write_frames(tmp_path / label / f"clip{clip}.mp4", [1, 2, 3])
    corpus = open_corpus(DataConfig(dataset=str(tmp_path)))
    assert (corpus.kind, len(corpus.manifest)) == ("video", 6)
    with open_source(corpus.manifest.path(0), data=DataConfig(), kind="video") as source:
        assert grays(source.read([0, 2])) == [1, 3]


def test_manifest_of_folders_files_and_windows(tmp_path: Path) -> None:
    write_frames(tmp_path / "clips" / "one", list(range(50)))
    write_frames(tmp_path / "clips" / "two", list(range(100, 150)))
    pages = [Image.new("RGB", (12, 8), (k, k, k)) for k in range(0, 250, 25)]
    # Delays of 100 ms, but the third shows for half a second.
    pages[0].save(tmp_path / "moving.gif", save_all=True, append_images=pages[1:], duration=[100, 100, 500] + [100] * 7)
    (tmp_path / "table.csv").write_text(
        "source,label,split,group,start_seconds,end_seconds\n"
        "clips/one,a,train,1,0.4,0.6\nclips/two,b,train,2,,\nclips/one,b,train,1,1.6,9\n"
        "moving.gif,a,train,3,0.15,0.75\nclips/absent,a,train,4,,\nmoving.gif,a,train,3,2,3\n"
    )
    corpus = open_corpus(DataConfig(dataset=str(tmp_path / "table.csv"), val_fraction=0, test_fraction=0))
    assert (corpus.kind, corpus.missing) == ("video", 1)
    dataset = ClipDataset(corpus, data=DataConfig(frame_size=8, num_frames=10).for_kind("video"))
    loaded = dataset.__getitems__([(0, row) for row in range(6)])
    assert loaded.batch is not None
    shown = {
        int(row): grays(frames[:length])
        for row, length, frames in zip(loaded.batch.indices, loaded.batch.lengths, loaded.batch.frames, strict=True)
    }
    assert shown == {
        0: [10, 11, 12, 13, 14],
        1: [102, 107, 112, 117, 122, 127, 132, 137, 142, 147],
        2: list(range(40, 50)),
        3: [25, 50, 75],
    }
    assert {row: reason.split(": ", 1)[1].split("\n")[0] for row, reason in loaded.failures} == {
        4: "no such file",
        5: "nothing lies between 2 and 3 seconds",
    }


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "image"), (".nii.gz", "volume")])
def test_windows_of_what_has_no_seconds_are_an_error(tmp_path: Path, suffix: str, kind: str) -> None:
    import nibabel

    for name in ("x", "y"):
        if kind == "image":
            Image.new("RGB", (12, 8)).save(tmp_path / f"{name}{suffix}")
        else:
            image = nibabel.Nifti1Image(np.arange(512, dtype=np.int16).reshape(8, 8, 8), np.eye(4))
            image.to_filename(tmp_path / f"{name}{suffix}")
    (tmp_path / "table.csv").write_text(
        f"source,label,split,start_seconds,end_seconds\nx{suffix},a,train,0,1\ny{suffix},b,train,,\n"
    )
    corpus = open_corpus(DataConfig(dataset=str(tmp_path / "table.csv"), val_fraction=0, test_fraction=0))
    loaded = ClipDataset(corpus, data=DataConfig(frame_size=8).for_kind(corpus.kind)).__getitems__([(0, 0), (0, 1)])
    ((row, reason),) = loaded.failures
    assert row == 0 and f"start_seconds and end_seconds are for videos, not for a {kind}" in reason
    assert "Leave the two columns empty" in reason


def test_links_out_of_a_manifest_s_folder_are_refused(tmp_path: Path) -> None:
    outside = write_frames(tmp_path / "outside", [1, 2, 3])
    root = tmp_path / "root"
    write_frames(root / "good", [1, 2])
    write_frames(root / "frames.mp4", [1, 2])
    (root / "frames.mp4" / "img_00003.png").symlink_to(outside / "img_00003.png")
    (root / "linked").symlink_to(outside)
    (root / "good" / "img_00003.png").symlink_to("img_00002.png")  # stays inside
    for source, words in (("frames.mp4", r"frames.mp4.*img_00003.png is a link"), ("linked", "'linked' is a link")):
        (root / "table.csv").write_text(f"source,label\ngood,a\n{source},b\n")
        with pytest.raises(DataError, match=words):
            open_corpus(DataConfig(dataset=str(root / "table.csv")))
    (root / "table.csv").write_text("source,label\ngood,a\ngood,b\n")
    assert open_corpus(DataConfig(dataset=str(root / "table.csv"))).kind == "video"


def test_kinetics_may_be_extracted_to_frames(tmp_path: Path) -> None:
    from videogru.data.manifests.dataset_card import load_card

    label = load_card("kinetics400").classes[0]
    rows = []
    for split in ("train", "val"):
        for clip in range(2):
            write_frames(tmp_path / split / label / f"{split}vid_{clip}_000001_000011", [1, 2, 3])
            rows.append(f"{label},{split}vid_{clip},1,11,{split}")
        header = "label,youtube_id,time_start,time_end,split\n"
        (tmp_path / f"{split}.csv").write_text(header + "\n".join(rows) + "\n")
        rows = []
    corpus = open_corpus(DataConfig(dataset="kinetics400", data_dir=tmp_path), for_training=False)
    assert (len(corpus.manifest), corpus.missing) == (4, 0)
    with open_source(corpus.manifest.path(0), data=DataConfig(), kind="video") as source:
        assert len(source.positions) == 3


def test_folders_for_files_are_found_once(tmp_path: Path) -> None:
    write_frames(tmp_path / "clip", [1, 2, 3])
    write_frames(tmp_path / "holder", [1, 2])
    write_frames(tmp_path / "holder" / "inner", [1, 2])
    write_frames(tmp_path, [1, 2])
    found = [path.relative_to(tmp_path).as_posix() for path in media_files(tmp_path, frame_folders=True)]
    assert found == [
        "img_00001.png",
        "img_00002.png",
        "clip",
        *(f"holder/img_0000{k}.png" for k in (1, 2)),
        "holder/inner",
    ]


# The command line -------------------------------------------------------------------------------------------------


def test_train_infer_and_data_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "data", clips=8)
    info = videogru("data", "info", "data", "--set", "data.folder_fps=12.5")
    assert info.code == 0, info.err
    for words in (
        r"kind +video",
        r"rows +16",
        r"frames per second +12.5",
        r"steps +6",
        r"videos of 12.5 frames per sec",
    ):
        assert re.search(words, info.out), words
    size = ("--set", "data.frame_size=16", "--set", "data.num_frames=4", "--batch-size", "4")
    done = videogru("train", "--dataset", "data", *QUICK, *size)
    assert done.code == 0, done.err

    def sources(*arguments: object, code: int = 0) -> list[str]:
        done = videogru("infer", *arguments, "--format", "jsonl")
        assert done.code == code, done.err
        return [json.loads(line)["source"] for line in done.out.splitlines()]

    assert sources("data/run/clip0") == ["data/run/clip0"]
    assert sources("data/run") == [f"data/run/clip{k}" for k in range(8)]
    (tmp_path / "empty").mkdir()
    write_frames(tmp_path / "single", [1])
    assert sources("data/walk/clip1", "empty", "single", code=3) == ["data/walk/clip1", "empty", "single"]


@pytest.mark.parametrize("has_video_run", [True, False])
def test_numbered_images_are_stills_to_who_has_no_video_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_video_run: bool
) -> None:
    write_frames(tmp_path / "photos", [1, 2, 3])
    for name in ("a", "b"):
        write_frames(tmp_path / "others", [1], name=f"{name}.png")
    asked: list[object] = []
    runs = {"video": Path("runs/v") if has_video_run else None, "image": Path("runs/i")}
    monkeypatch.setattr(answers, "newest_model", lambda _, kind: asked.append(kind) or runs[kind])
    assert answers.newest_fitting([str(tmp_path / "photos")], print) == runs["video" if has_video_run else "image"]
    assert answers.newest_fitting([str(tmp_path / "others")], print) == runs["image"]
    stills, _ = zip(*answers.expand([str(tmp_path / "photos")], "image", print), strict=True)
    assert stills == tuple(str(tmp_path / "photos" / f"img_0000{k}.png") for k in (1, 2, 3))
