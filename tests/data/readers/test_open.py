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
from videogru.data.clips.read_clip import read_clip, read_clips
from videogru.data.readers.dicom_files import DICOM_SUFFIXES
from videogru.data.readers.file_types import SUFFIXES, kind_of_name
from videogru.data.readers.image import StillImage
from videogru.data.readers.open import open_source
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.data.readers.volume.volume import Volume
from videogru.errors import ConfigError, SourceError

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
        ("a.dcm", "volume"),
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
        ("a.dcm", "is no DICOM file"),
        ("bare.nii", "holds no image"),
        ("series", "is no DICOM file"),
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
        clip = read_clip(source, data=DATA, draws=np.array([0.0, 0.99, 0.4, 0.6, 0.5]))
        assert numbers(clip.frames) == [0, 11, 14, 21]
        with pytest.raises(ValueError, match="shape"):
            read_clip(source, data=DATA, draws=np.zeros(4))


def test_the_policies_of_sampling(tmp_path: Path) -> None:
    def clip(sampling: str, draws: np.ndarray | None = None) -> list[int]:
        data = DATA.model_copy(update={"sampling": sampling, "stride_seconds": 0.08})
        return numbers(read_clip(source, data=data, draws=draws).frames)

    first, last = np.zeros(5), np.full(5, 0.999)
    with open_source(gray_video(tmp_path / "a.mp4", 24), data=DATA) as source:
        assert clip("random") == clip("uniform") == clip("uniform", first) == [3, 9, 15, 21]
        assert clip("random", first) == [0, 6, 12, 18]
        # 4 strides of 2 frames; centers of strides; from the middle: 8..16
        assert clip("dense", first) == [1, 3, 5, 7]
        assert clip("dense") == [9, 11, 13, 15]
        assert clip("dense", last) == [16, 18, 20, 22]
        assert clip("all") == clip("all", first) == list(range(24))


def test_context_and_shift_of_a_window_stay_inside_the_video(tmp_path: Path) -> None:
    def clip(window: tuple[float, float], draw: float | None = None, **settings: float) -> list[int]:
        augment = DATA.augment.model_copy(update={"shift_seconds": settings.pop("shift", 0.0)})
        data = DATA.model_copy(update={"sampling": "all", "augment": augment, **settings})
        draws = None if draw is None else np.array([0.5] * 4 + [draw])
        return numbers(read_clip(source, data=data, window=window, draws=draws).frames)

    with open_source(gray_video(tmp_path / "a.mp4", 25), data=DATA) as source:
        window = (0.4, 0.56)
        assert clip(window, context_seconds=0.08) == list(range(8, 16))
        assert clip((0.0, 0.08), context_seconds=0.08) == [0, 1, 2, 3]
        assert clip(window, 0.0, shift=0.08) == [8, 9, 10, 11]
        assert clip(window, 0.5, shift=0.08) == clip(window, shift=0.08) == [10, 11, 12, 13]
        assert clip(window, 0.99, shift=0.08) == [11, 12, 13, 14, 15]  # 0.478..0.638: parts of five frames show
        assert clip((0.92, 1.0), 0.999, shift=0.5) == [23, 24]
        assert clip((0.0, 0.08), 0.0, shift=0.5) == [0, 1]
        with pytest.raises(SourceError, match="nothing lies between"):
            clip((1.02, 1.1), context_seconds=0.2)


def test_several_clips_are_decoded_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clips(count: int, **settings: object) -> list[list[int]]:
        return [
            numbers(clip.frames) for clip in read_clips(source, data=DATA.model_copy(update=settings), num_clips=count)
        ]

    with open_source(gray_video(tmp_path / "a.mp4", 24), data=DATA) as source:
        assert clips(1) == [[3, 9, 15, 21]]
        # segments of 6 frames at 1/6, 3/6, 5/6
        assert clips(3) == [[1, 7, 13, 19], [3, 9, 15, 21], [5, 11, 17, 23]]
        dense = {"sampling": "dense", "stride_seconds": 0.08}
        assert clips(3, **dense) == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23]]
        asked: list[list[int]] = []
        read = source.read
        monkeypatch.setattr(source, "read", lambda indices: asked.append(list(indices)) or read(indices))
        clips(3)
        assert asked == [[1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]]


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
        clip = read_clip(source, data=DATA, draws=np.full(5, 0.7))
    assert clip.frames.shape == (1, 3, 3, 4)
    assert (clip.unit, clip.positions.tolist()) == ("index", [0.0])


@pytest.mark.parametrize("slab", [3, 5])
def test_a_slab_has_the_neighbors_in_the_scan_as_channels(tmp_path: Path, slab: int) -> None:
    """Of the scan, not of the chosen slices; beyond the ends the last slice stands again."""
    values = np.random.default_rng(0).integers(0, 255, (6, 6, 9), dtype=np.uint8)
    nib.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "scan.nii")
    data = DataConfig(num_frames=4, slab=slab, intensity="window").for_kind("volume")
    plain = DataConfig(sampling="all", intensity="window").for_kind("volume")
    with open_source(tmp_path / "scan.nii", data=data) as source:
        clip, several = read_clip(source, data=data), read_clips(source, data=data, num_clips=2)
        whole = read_clip(source, data=plain).frames[:, 0]
    assert data.channels == slab
    for found in (clip, *several):
        assert found.frames.shape == (4, slab, 6, 6)
        for step, position in enumerate(found.positions.long().tolist()):
            around = [min(max(position + k - slab // 2, 0), 8) for k in range(slab)]
            assert torch.equal(found.frames[step], whole[around])


def test_slabs_are_for_volumes_and_odd() -> None:
    for kind in ("video", "image"):
        with pytest.raises(ConfigError, match="slab"):
            DataConfig(slab=3).for_kind(kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="odd"):
        DataConfig(slab=2)
    for channels, given in ((2, 1), (1, 3)):
        with pytest.raises(ValueError, match="channels"):
            DataConfig(slab=given, channels=channels)
