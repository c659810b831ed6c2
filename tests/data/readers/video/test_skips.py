"""Frames that no other refers to are not decoded on the way; what is returned must not show it."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from videogru.data.readers.video import pyav_reader as video_pyav
from videogru.data.readers.video import seek as video_seek
from videogru.data.readers.video.pyav_reader import PyavVideo

COUNT = 60
VARIANTS = {
    "b-frames": "bframes=3:b-pyramid=none:b-adapt=0",
    "b-pyramid": "bframes=5:b-pyramid=normal:b-adapt=0",
    "open groups": "bframes=3:open-gop=1:keyint=15",
    "many references": "bframes=2:ref=6:direct=temporal:weightp=2",
    "near keys": "bframes=2:keyint=12",
    "interlaced": "bframes=2:interlaced=1",
    "no b-frames": "bframes=0",
}


def moving_picture(path: Path, params: str) -> None:
    """Sliding noise with a bar, so that motion is found and each frame differs."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (64, 400, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "28", "x264-params": params + ":threads=1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for step in range(COUNT):
            picture = texture[:, 3 * step : 3 * step + 96].copy()
            picture[step : step + 4] = 4 * step
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipping_changes_no_bit(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    moving_picture(path, VARIANTS[variant])
    with av.open(str(path)) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    expected = torch.from_numpy(whole).permute(0, 3, 1, 2)
    assert len(expected) == COUNT
    rng = np.random.default_rng(1)
    with PyavVideo(path) as video:
        monkeypatch.setattr(video, "_read_in_order", None)  # no second way
        for count in (1, 1, 1, 1, 2, 3, 5, 8, 16, 40, COUNT):
            indices = np.sort(rng.choice(COUNT, count, replace=False)).tolist()
            assert torch.equal(video.read(indices), expected[indices]), indices


def decoded_for(path: Path, index: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Frames that the decoder gave for one."""
    frames: list[object] = []
    original = video_pyav.decode_run

    def noted(*arguments: object, **how: bool) -> Iterator[object]:
        for frame in original(*arguments, **how):
            frames.append(frame)
            yield frame

    monkeypatch.setattr(video_pyav, "decode_run", noted)
    with PyavVideo(path) as video:
        video.read([index])
    return len(frames)


def test_what_no_frame_refers_to_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving_picture(tmp_path / "a.mp4", VARIANTS["b-frames"])
    assert 0 < decoded_for(tmp_path / "a.mp4", COUNT - 2, monkeypatch) < COUNT / 2


def test_the_decoder_is_emptied_after_the_last_wanted_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one packet behind the wanted frame's own is decoded: what is behind it may even be damaged."""
    path = tmp_path / "a.mp4"
    moving_picture(path, "bframes=3:b-pyramid=none:b-adapt=0:keyint=12:scenecut=0")
    sent: list[int] = []
    original = video_seek._packets_from

    def noted(*arguments: object) -> Iterator[tuple[int | None, object]]:
        for place, packet in original(*arguments):
            sent.append(place)
            yield place, packet

    monkeypatch.setattr(video_seek, "_packets_from", noted)
    with PyavVideo(path) as video:
        table = video._table
        assert table is not None
        for index in range(COUNT):
            sent.clear()
            video.read([index])
            assert sent[-1] == table.shown[index]


def test_a_frame_that_may_lack_its_second_field_is_not_drained(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    moving_picture(path, VARIANTS["interlaced"])
    with av.open(str(path)) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with PyavVideo(path) as video:
        assert not video._drains
        video._drains = True  # as where only later frames are interlaced
        assert np.array_equal(video.read([7, 30]).permute(0, 2, 3, 1), whole[[7, 30]])
        assert not video._drains
        assert video.details["access"] == "by seeking"
