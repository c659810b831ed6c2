"""Video that comes from elsewhere and is read once: an address (RTSP, HTTP) or a camera, by PyAV."""

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from videogru.data.readers.video.container import MAX_FRAME_PIXELS, picture_of, upright, video_stream
from videogru.errors import ConfigError, SourceError

SCHEMES = ("rtsp", "rtsps", "http", "https")
TIMEOUT_SECONDS = 10.0  # for an answer, and then between two packets
MAX_GAP_SECONDS = 10.0  # a longer one is a new time line: the camera was restarted, or its clock was set
# Nothing on this machine's disk, whatever a playlist says.
_PROTOCOLS = "rtsp,rtp,rtcp,udp,tcp,tls,http,https,httpproxy,crypto,srtp"
# By sys.platform: FFmpeg's input device, and what it calls camera N.
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}:none")}
_PIPE_HINT = (
    "Let FFmpeg read it: ffmpeg {} -f rawvideo -pix_fmt rgb24 -s 320x240 - | videogru stream - --size 320x240 --fps 30"
)


class StreamFrame(NamedTuple):
    """A frame that was taken: RGB (H W 3), uint8, and when it begins, in seconds."""

    pixels: NDArray[np.uint8]
    seconds: float


Takes = Callable[[float, float], bool]  # [begins, ends) in seconds: whether to read the frame


def is_address(source: str) -> bool:
    """Whether a source is meant as an address, not as a file."""
    return "://" in source


def shown_address(address: str) -> str:
    """The address without the password that it may hold."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else address


class NetworkVideo:
    """The best video stream behind an address or of a camera; `is_live`: it does not wait for who reads it.

    Live is what has no end that is known: a camera, RTSP, HTTP without a duration. extent: (start, end) in seconds
    where it has one. Frames are turned upright. Time stamps of what is live count from 0 at its first frame and never
    go back.
    """

    count: int | None = None  # of frames, which no header tells for certain

    def __init__(self, name: str, container: Any) -> None:
        self.name, self.pixel_aspect = name, 1.0
        self._container = container
        try:
            self._stream = video_stream(container, name)
        except SourceError:
            self.close()
            raise
        start, duration, base = self._stream.start_time, self._stream.duration, self._stream.time_base
        if not duration and container.duration:
            start, duration, base = container.start_time, container.duration, 1 / av.time_base
        self.is_live = not duration or "rtsp" in container.format.name.split(",")
        first = float((start or 0) * base)
        self.extent = None if self.is_live else (first, first + float(duration * base))
        rate = self._stream.average_rate or self._stream.guessed_rate
        self._usual = 1 / float(rate) if rate else 0.04  # seconds that a frame shows

    @classmethod
    def at_address(cls, address: str) -> "NetworkVideo":
        """Open an address. Raises ConfigError on one of another kind, SourceError where there is no answer or video."""
        scheme, name = urlsplit(address).scheme.lower(), shown_address(address)
        if scheme not in SCHEMES:
            raise ConfigError(
                f"addresses begin with {', '.join(SCHEMES)}, not {scheme}", where=name, hint="Or name a file on disk."
            )
        options = {"protocol_whitelist": _PROTOCOLS}
        if scheme.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"  # over UDP, lost packets become gray blocks
        return cls(name, _opened(address, name, options=options))

    @classmethod
    def of_camera(cls, number: int) -> "NetworkVideo":
        """Open camera `number`. Raises ConfigError where PyAV reads no cameras, SourceError where there is none."""
        form, pattern = CAMERAS.get(sys.platform, ("", ""))
        device = pattern.format(number)
        if form not in av.formats_available:
            missing = f"{form} is not in this build of PyAV" if form else f"not on {sys.platform}"
            raise ConfigError(
                f"a camera cannot be read here: {missing}",
                where=f"camera {number}",
                hint=_PIPE_HINT.format(f"-f {form} -i {device}" if form else "-i CAMERA"),
            )
        video = cls(f"camera {number}", _opened(device, f"camera {number}", format=form))
        video.is_live, video.extent = True, None
        return video

    def frames(self, takes: Takes) -> Iterator[StreamFrame]:
        """The frames that `takes` wants, as they come. Raises SourceError where no more come before the end."""
        picture, reformatter = None, VideoReformatter()
        for frame, begins, ends in self._shown():
            if picture is None:
                picture = picture_of(frame, self._stream)
                self.pixel_aspect = picture.aspect
            if takes(begins, ends):
                try:
                    pixels = upright(frame, picture, reformatter)
                except Exception as error:
                    raise _failed(self.name, error) from error
                yield StreamFrame(pixels, begins)
        if picture is None:
            raise SourceError("not one frame can be decoded", where=self.name, hint="Check that it plays.")

    def close(self) -> None:
        """Hang up; may be called twice."""
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
            gc.collect(1)  # see PyavVideo.close

    def _shown(self) -> Iterator[tuple[Any, float, float]]:
        """Frames with [begins, ends): how long one shows is known when the next is here; live, it is guessed."""
        if self.is_live:
            for frame, begins in self._timed():
                yield frame, begins, begins + self._usual
            return
        held: tuple[Any, float] | None = None
        for frame, begins in self._timed():
            if held is not None:
                yield *held, begins
            held = frame, begins
        if held is not None:
            yield *held, max(held[1] + self._usual, self.extent[1] if self.extent else 0.0)

    def _timed(self) -> Iterator[tuple[Any, float]]:
        """Decoded frames and when they begin, strictly increasing."""
        last: float | None = None
        offset = 0.0
        for frame in self._decoded():
            raw = None if frame.pts is None else frame.pts * frame.time_base.numerator / frame.time_base.denominator
            if last is None:
                offset = -raw if self.is_live and raw is not None else 0.0
                begins = 0.0 if raw is None else raw + offset
            else:
                begins = last if raw is None else raw + offset
                if not 0 < begins - last <= MAX_GAP_SECONDS:
                    begins = last + self._usual
                    offset = offset if raw is None else begins - raw
            last = begins
            yield frame, begins

    def _decoded(self) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except Exception as error:
                raise _failed(self.name, error) from error
            if packet is None:
                return
            try:
                frames = packet.decode()
            except FFmpegError:  # what was lost on the way; the next key frame mends it
                continue
            yield from (frame for frame in frames if not frame.is_corrupt)


def _opened(file: str, name: str, **how: Any) -> Any:
    how["options"] = {**how.get("options", {}), "max_pixels": str(MAX_FRAME_PIXELS)}
    try:
        return av.open(file, timeout=TIMEOUT_SECONDS, metadata_errors="replace", **how)
    except Exception as error:
        raise _failed(name, error) from error


def _failed(name: str, error: Exception) -> SourceError:
    """Whatever PyAV raises, as one line; its own text may repeat the address with the password."""
    # After the time is up, PyAV interrupts FFmpeg, which then says that it was asked to exit.
    if isinstance(error, av.error.ExitError | av.error.TimeoutError):
        return SourceError(
            f"nothing came for {TIMEOUT_SECONDS:g} seconds", where=name, hint="Check that it plays: ffplay ADDRESS"
        )
    reason = getattr(error, "strerror", None) or type(error).__name__
    return SourceError(f"cannot be read ({reason})", where=name, hint="Check that it plays: ffplay ADDRESS")
