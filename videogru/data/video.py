"""Opens a video with one of three decoders behind the same protocol."""

from pathlib import Path
from typing import Literal

from videogru.data import video_decord, video_torchcodec
from videogru.data.frames import FrameSource
from videogru.data.video_decord import DecordVideo
from videogru.data.video_pyav import PyavVideo
from videogru.data.video_torchcodec import TorchcodecVideo
from videogru.errors import SourceError

Decoder = Literal["auto", "pyav", "decord", "torchcodec"]


def check_decoder(decoder: Decoder) -> None:
    """Raises ConfigError where the decoder is not installed; before the work, not in a worker process."""
    if decoder == "decord":
        video_decord.load()
    elif decoder == "torchcodec":
        video_torchcodec.load()


def open_video(path: Path, *, decoder: Decoder = "auto") -> FrameSource:
    """A video as uint8 RGB (T 3 H W) with frame starts in seconds on its own time line.

    The first frame is where the file puts it, which need not be 0. decord and torchcodec decode what PyAV has indexed,
    so that positions do not depend on the decoder, and each frame's time stamp is checked against the index.
    Raises SourceError where the file, or the decoder on it, is no good; ConfigError where the decoder is not installed.
    """
    video = PyavVideo(path)
    # auto: of the three, only PyAV was right on every file we have, and only it needs nothing beyond its wheel.
    if decoder in ("auto", "pyav"):
        return video
    with video:
        if video.details["access"] == "in order":
            # decord hangs on MPEG-TS; both give wrong frames with right time stamps from AVI with B-frames.
            raise SourceError(
                f"{decoder} cannot be trusted with MPEG-TS, or where time stamps are missing or out of order",
                where=path,
                hint="Use data.decoder=pyav.",
            )
        reader = DecordVideo if decoder == "decord" else TorchcodecVideo
        return reader(
            path,
            positions=video.positions,
            extent=video.extent,
            pixel_aspect=video.pixel_aspect,
            details={**video.details, "access": decoder},
        )
