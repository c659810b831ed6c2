"""A stream of frames, whatever it comes from: a file, an address, a camera, or raw bytes on standard input."""

from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from videogru.config import DataConfig
from videogru.data.readers.open import open_source
from videogru.data.readers.source import FrameSource
from videogru.data.readers.video.container import MAX_FRAME_PIXELS
from videogru.data.readers.video.live import NetworkVideo, StreamFrame, Takes, is_address
from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import ConfigError, SourceError


@runtime_checkable
class FrameStream(Protocol):
    """Frames in order of time, read once.

    name: as messages show it; is_live: it does not wait for who reads it; extent: (start, end) in seconds and count:
    frames in it, None where not known; pixel_aspect: height of a pixel over its width, right from the first frame on.
    """

    name: str
    is_live: bool
    extent: tuple[float, float] | None
    count: int | None
    pixel_aspect: float

    def frames(self, takes: Takes) -> Iterator[StreamFrame]:
        """The frames that `takes`, asked once for each in order, wants. Raises SourceError where one cannot be read."""
        ...

    def close(self) -> None:
        """Let go of the source; may be called twice."""
        ...


class FileVideo:
    """A `FrameSource` in seconds as a stream: its positions are known, so frames are those that training would see."""

    is_live = False

    def __init__(self, source: FrameSource) -> None:
        self._source = source
        self.name, self.pixel_aspect = str(source.path), source.pixel_aspect
        self.extent: tuple[float, float] | None = source.extent
        self.count: int | None = len(source.positions)

    def frames(self, takes: Takes) -> Iterator[StreamFrame]:
        """The wanted frames; they are chosen before the first is decoded."""
        source = self._source
        begins = source.positions.tolist()
        ends = [*begins[1:], source.extent[1]]
        chosen = [index for index, shown in enumerate(zip(begins, ends, strict=True)) if takes(*shown)]
        if isinstance(source, PyavVideo):
            pictures = source.one_by_one(chosen)
        else:
            pictures = (source.read([index])[0].permute(1, 2, 0).numpy() for index in chosen)
        for index, pixels in zip(chosen, pictures, strict=True):
            yield StreamFrame(pixels, begins[index])

    def close(self) -> None:
        """Let go of the file."""
        self._source.close()


class RawVideo:
    """Frames of packed RGB (rgb24) one after the other, `fps` a second. Who writes them waits for who reads them."""

    is_live = False
    extent: tuple[float, float] | None = None
    count: int | None = None
    pixel_aspect = 1.0

    name = "standard input"

    def __init__(self, file: BufferedIOBase, *, size: tuple[int, int], fps: float) -> None:
        self._file, self._size, self._fps = file, size, fps

    def frames(self, takes: Takes) -> Iterator[StreamFrame]:
        """The wanted frames until the input ends. Raises SourceError where it ends inside of one, or is empty."""
        width, height = self._size
        whole, index = width * height * 3, 0
        while data := self._file.read(whole):
            if len(data) < whole:
                raise SourceError(
                    f"frame {index} ends after {len(data):,} of {whole:,} bytes",
                    where=self.name,
                    hint=f"It was cut off, or its frames are not {width}x{height} rgb24: check --size.",
                )
            if takes(index / self._fps, (index + 1) / self._fps):
                yield StreamFrame(np.frombuffer(data, np.uint8).reshape(height, width, 3), index / self._fps)
            index += 1
        if index == 0:
            raise SourceError("is empty", where=self.name, hint="Nothing was written to it.")

    def close(self) -> None:
        """The input stays as it is."""


def open_stream(
    source: str,
    *,
    data: DataConfig,
    stdin: BufferedIOBase | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> FrameStream:
    """source: a file or folder of frames, the number of a camera, an address, or `-` for raw frames on `stdin`.

    size: (width, height) and fps, of raw frames. Raises ConfigError where these do not fit the source, SourceError
    where it cannot be opened.
    """
    if source == "-":
        if size is None or fps is None:
            raise ConfigError(
                "raw frames do not say what they are",
                where="standard input",
                hint="Add --size WIDTHxHEIGHT and --fps FRAMES_PER_SECOND.",
            )
        if size[0] * size[1] > MAX_FRAME_PIXELS:
            what = f"--size {size[0]}x{size[1]} is more than {MAX_FRAME_PIXELS >> 20} megapixels"
            raise ConfigError(what, hint="Make the frames smaller first.")
        if stdin is None:
            raise ValueError("raw frames need the file that they are read from")
        return RawVideo(stdin, size=size, fps=fps)
    if size is not None or fps is not None:
        raise ConfigError("--size and --fps are for raw frames on standard input (-)", hint="Leave them out.")
    if is_address(source):
        return NetworkVideo.at_address(source)
    if source.isascii() and source.isdecimal() and not Path(source).exists():
        return NetworkVideo.of_camera(int(source))
    return FileVideo(open_source(Path(source), data=data.model_copy(update={"decoder": "auto"}), kind="video"))
