"""What end-to-end tests share: the command line called in this process, and small sources of each kind."""

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import nibabel
import numpy as np
import pytest
from PIL import Image

from videogru.cli import main as cli

QUICK = [
    *("--epochs", "1"),
    *("--set", "model.encoder_width=8", "--set", "model.hidden_size=8", "--set", "train.num_workers=0"),
]


def videogru(*arguments: object) -> SimpleNamespace:
    """Type a command in the current folder."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    argv, sys.argv = sys.argv, ["videogru", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = argv
    text = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return SimpleNamespace(code=caught.value.code, out=text[0], err=text[1])


def write_video(path: Path, *, bright: bool, seed: int, frames: int = 12) -> None:
    """A bar that moves right (bright) or left."""
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for step in range(frames):
            picture = generator.integers(0, 40, (32, 48, 3), dtype=np.uint8)
            place = step * 3 if bright else 44 - step * 3
            picture[:, place : place + 4] = 250
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_volume(path: Path, *, large: bool, seed: int) -> None:
    """A ball in noise."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 18, 12)), indexing="ij"))
    center = np.array([10, 9, 6]).reshape(3, 1, 1, 1)
    ball = ((grid - center) ** 2).sum(axis=0) < (25 if large else 8)
    voxels = generator.normal(100, 10, ball.shape) + 300 * ball
    nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.0, 2.5, 1.0])).to_filename(path)


def write_picture(path: Path, *, bright: bool, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 100, (24, 30, 3)) + (120 if bright else 0)
    Image.fromarray(noise.astype(np.uint8)).save(path)


KINDS = {
    "video": (".mp4", lambda path, flag, seed: write_video(path, bright=flag, seed=seed)),
    "volume": (".nii.gz", lambda path, flag, seed: write_volume(path, large=flag, seed=seed)),
    "image": (".png", lambda path, flag, seed: write_picture(path, bright=flag, seed=seed)),
}
