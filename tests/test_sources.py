"""From paths to clips: the right reader, the right steps, and a clear word where there is none."""

import os
from fractions import Fraction
from pathlib import Path

import av
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from videogru.config import DataConfig
from videogru.data.frames import SUFFIXES, kind_of_name
from videogru.data.image import StillImage
from videogru.data.sources import DICOM_SUFFIXES, open_source, read_clip
from videogru.data.video_pyav import PyavVideo
from videogru.data.volume import Volume
from videogru.errors import SourceError

DATA = DataConfig(num_frames=4, percentile_low=0, percentile_high=100)


def gray_video(path: Path, count: int = 25, start: int = 0) -> Path:
    """25 frames a second; frame k is gray 8 * k; times begin at start / 25 seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + start, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames: torch.Tensor) -> list[int]:
    return (frames.float().mean((1, 2, 3)) / 8).round().int().tolist()


@pytest.fixture
def volume_path(tmp_path: Path) -> Path:
    array = np.broadcast_to(np.arange(8, dtype=np.int16), (5, 6, 8)).copy()
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.mp4", "video"),
        ("a.b.MKV", "video"),
        ("a.gif", "video"),
        ("a.nii", "volume"),
        ("a.NII.GZ", "volume"),
        ("sub.01.nii.gz", "volume"),
        ("a.img.gz", "volume"),
        ("a.mgz", "volume"),
        ("a.JPeG", "image"),
        ("a.tar.gz", None),
        ("a.gz", None),
        ("a.dcm", None),
        ("mp4", None),
        (".nii", None),
        ("a", None),
    ],
)
def test_kinds_by_suffix(name: str, kind: str | None) -> None:
    assert kind_of_name(name) == kind


def test_no_suffix_has_two_kinds() -> None:
    sets = [*SUFFIXES.values(), DICOM_SUFFIXES]
    assert len(frozenset().union(*sets)) == sum(map(len, sets))


def test_each_kind_gets_its_reader(tmp_path: Path, volume_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for path, kind, reader in (
        (gray_video(tmp_path / "a.mp4"), "video", PyavVideo),
        (volume_path, "volume", Volume),
        (tmp_path / "a.png", "image", StillImage),
    ):
        with open_source(str(path), data=DATA, kind=kind) as source:
            assert isinstance(source, reader)
            assert (source.kind, source.path) == (kind, path)
        other = "image" if kind == "video" else "video"
        with pytest.raises(SourceError, match=f"of kind {kind}, expected {other}"):
            open_source(path, data=DATA, kind=other)


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    pages = [Image.new("L", (16, 16), 60 * number) for number in range(4)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=100)
    with open_source(tmp_path / "a.gif", data=DATA) as source:
        clip = read_clip(source, data=DATA)
    assert clip.positions.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 60, 120, 180]


def test_paths_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.txt").write_text("no video")
    (tmp_path / "a.dcm").write_bytes(b"x" * 200)
    (tmp_path / "bare.nii").write_bytes(bytes(128) + b"DICM" + bytes(99))
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"x")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, message in (
        ("nowhere.mp4", "no such file"),
        ("empty.mp4", "0 bytes"),
        ("text.txt", "unknown suffix '.txt'"),
        ("a.dcm", "DICOM, which is not supported"),
        ("bare.nii", "DICOM, which is not supported"),
        ("series", "folder of DICOM"),
        ("folder.mp4", "is a folder"),
        ("pipe.mp4", "no regular file"),
        ("x" * 300 + ".mp4", "no such file|cannot be opened"),
        ("nul\0.mp4", "no such file|cannot be opened"),
    ):
        with pytest.raises(SourceError, match=message) as caught:
            open_source(tmp_path / name, data=DATA)
        assert caught.value.where
        assert caught.value.hint


def test_a_video_clip_at_the_centers_of_its_segments(tmp_path: Path) -> None:
    with open_source(gray_video(tmp_path / "a.mp4", 24), data=DATA) as source:
        clip = read_clip(source, data=DATA)
    # 24 frames in 4 segments of 6; the center of a segment is where its fourth frame begins
    assert numbers(clip.frames) == [3, 9, 15, 21]
    assert clip.positions.tolist() == pytest.approx([0.12, 0.36, 0.6, 0.84])
    assert (clip.unit, clip.frames.dtype) == ("seconds", torch.uint8)


def test_a_window_of_a_video(tmp_path: Path) -> None:
    with open_source(gray_video(tmp_path / "a.mp4"), data=DATA) as source:
        assert numbers(read_clip(source, data=DATA, window=(0.4, 0.56)).frames) == [10, 11, 12, 13]
        assert numbers(read_clip(source, data=DATA, window=(0.4, 0.48)).frames) == [10, 11]
        assert numbers(read_clip(source, data=DATA, window=(0.41, 0.42)).frames) == [10]
        assert numbers(read_clip(source, data=DATA, window=(0.92, 9.0)).frames) == [23, 24]
        assert len(read_clip(source, data=DATA, window=(-5.0, 99.0))) == 4
        for window in ((1.0, 2.0), (0.5, 0.5), (0.6, 0.5), (-1.0, 0.0), (float("nan"), 1.0)):
            with pytest.raises(SourceError, match="nothing lies between") as caught:
                read_clip(source, data=DATA, window=window)
            assert "0 to 1 seconds" in str(caught.value.hint)


def test_a_window_counts_on_the_videos_own_time_line(tmp_path: Path) -> None:
    with open_source(gray_video(tmp_path / "a.mkv", 25, start=50), data=DATA) as source:
        assert source.positions[0] == pytest.approx(2.0)
        assert numbers(read_clip(source, data=DATA, window=(2.4, 2.48)).frames) == [10, 11]
        with pytest.raises(SourceError, match="nothing lies"):
            read_clip(source, data=DATA, window=(0.4, 0.48))


def test_draws_choose_the_frame_within_each_segment(tmp_path: Path) -> None:
    with open_source(gray_video(tmp_path / "a.mp4", 24), data=DATA) as source:
        clip = read_clip(source, data=DATA, draws=np.array([0.0, 0.99, 0.4, 0.6]))
        assert numbers(clip.frames) == [0, 11, 14, 21]
        with pytest.raises(ValueError, match="shape"):
            read_clip(source, data=DATA, draws=np.zeros(3))


def test_a_short_video_gives_a_short_clip(tmp_path: Path) -> None:
    with open_source(gray_video(tmp_path / "a.mp4", 3), data=DATA) as source:
        assert numbers(read_clip(source, data=DATA).frames) == [0, 1, 2]


def test_a_volume_clip_in_millimetres(volume_path: Path) -> None:
    with open_source(volume_path, data=DATA) as source:
        clip = read_clip(source, data=DATA)
        # 8 slices in 4 segments of 2: the center lies between two, the later one is taken
        assert clip.positions.tolist() == [3.0, 9.0, 15.0, 21.0]
        assert clip.unit == "mm"
        torch.testing.assert_close(clip.frames.amax((1, 2, 3)), torch.tensor([1.0, 3.0, 5.0, 7.0]) / 7)
        with pytest.raises(SourceError, match="are for videos, not for a volume"):
            read_clip(source, data=DATA, window=(0.0, 1.0))


def test_an_image_clip(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "a.png")
    with open_source(tmp_path / "a.png", data=DATA) as source:
        clip = read_clip(source, data=DATA, draws=np.full(4, 0.7))
    assert clip.frames.shape == (1, 3, 3, 4)
    assert (clip.unit, clip.positions.tolist()) == ("index", [0.0])
