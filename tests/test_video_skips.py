"""Frames that no other refers to are not decoded on the way; what is returned must not show it."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from videogru.data.video_pyav import PyavVideo

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


def test_what_no_frame_refers_to_is_not_decoded(tmp_path: Path) -> None:
    moving_picture(tmp_path / "a.mp4", VARIANTS["b-frames"])
    decoded = []
    with PyavVideo(tmp_path / "a.mp4") as video:
        read_on = video._decode_from
        video._decode_from = lambda key: (decoded.append(frame.pts) or frame for frame in read_on(key))
        video.read([COUNT - 2])
    assert 0 < len(decoded) < COUNT / 2
