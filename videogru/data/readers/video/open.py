"""Opens a video with one of three decoders behind the same protocol."""

from pathlib import Path
from typing import Literal

from videogru.data.readers.source import FrameSource
from videogru.data.readers.video import decord_reader as video_decord
from videogru.data.readers.video import torchcodec_reader as video_torchcodec
from videogru.data.readers.video.decord_reader import DecordVideo
from videogru.data.readers.video.key_frames import starts_anew
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.data.readers.video.torchcodec_reader import TorchcodecVideo
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
    so that positions do not depend on the decoder, and their time stamps are checked against the index.
    Raises SourceError where the file, or the decoder on it, is no good; ConfigError where the decoder is not installed.
    """
    video = PyavVideo(path)
    # auto: of the three, only PyAV was right on every file we have, and only it needs nothing beyond its wheel.
    if decoder in ("auto", "pyav"):
        return video
    with video:
        hint = "Use data.decoder=pyav, which reads it right."
        if video.details["access"] == "in order":
            # decord hangs on MPEG-TS; both give wrong frames with right time stamps from AVI with B-frames.
            what = "is MPEG-TS or another MPEG stream, or its time stamps are missing, repeated or made up"
            raise SourceError(f"{what}: it is decoded in order, which {decoder} does not do", where=path, hint=hint)
        if decoder == "decord" and video.guard(lambda: _has_open_group(video)):
            what = "frames after a key frame need others before it (open group or intra refresh)"
            raise SourceError(f"decord gives wrong frames where {what}", where=path, hint=hint)
        reader = DecordVideo if decoder == "decord" else TorchcodecVideo
        return reader(
            path,
            positions=video.positions,
            extent=video.extent,
            pixel_aspect=video.pixel_aspect,
            details={**video.details, "access": decoder},
        )


def _has_open_group(video: PyavVideo) -> bool:
    """Whether after some key frame there may be frames that need others before it, which a plain seek leaves out.

    One more pass over the packets, which stops at the first such frame.
    """
    key: int | None = None
    for packet in video.packets():
        if packet.size == 0 or packet.pts is None:
            continue
        if packet.is_keyframe:
            codec = packet.stream.codec_context
            if not starts_anew(codec.name, bytes(packet), codec.extradata):
                return True
            key = packet.pts
        elif key is not None and packet.pts < key:  # decoded after it, shown before it
            return True
    return False
