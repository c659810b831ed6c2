"""What all readers of containers share: which stream is the video, and how its frames are turned into upright RGB."""

from pathlib import Path
from typing import Any

import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from videogru.data.readers.video.packet_index import Picture
from videogru.errors import SourceError

MAX_FRAME_PIXELS = 2**26  # twice 8K; a damaged header claims anything
_AVI_TAIL = 1024  # bytes: about so few at the end, which are its index, writers disagree
_RIFF_HEAD = 8  # bytes: its name, and how many come after them


def video_stream(container: Any, where: object) -> Any:
    """The video stream of an opened container, ready to be decoded by one thread. Raises SourceError."""
    # FFmpeg's choice, as players show it; but never a cover picture.
    best = container.streams.best("video")
    streams = [s for s in (best, *container.streams.video) if s and not s.disposition & Disposition.attached_pic]
    if not streams:
        raise SourceError("holds no video stream", where=where, hint="Give a file that holds the video itself.")
    codec = streams[0].codec_context
    if codec is None:
        raise SourceError("is in a codec that FFmpeg does not know", where=where, hint="Re-encode it.")
    if codec.width * codec.height > MAX_FRAME_PIXELS:
        raise SourceError(
            f"declares frames of {codec.width}x{codec.height}, more than {MAX_FRAME_PIXELS >> 20} megapixels",
            where=where,
            hint="The header may be damaged; if not, make the video smaller first.",
        )
    codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    # Speed comes from worker processes; threads cost a third more and can lock up on damaged files.
    streams[0].thread_type = "NONE"
    codec.thread_count = 1
    return streams[0]


def refuse_cut_off(container: Any, stream: Any, path: Path) -> None:
    """Raise SourceError where an opened container knows where its video ends, and the file ends before.

    MP4: its tables say where each frame lies; AVI: the size of its first RIFF chunk. Counts of frames say less: those
    of AVI include frames that were dropped when it was made, those of MP4 what an edit list leaves out.
    """
    formats = set(container.format.name.split(","))
    if "mp4" in formats:
        end, allowed = max((entry.pos + entry.size for entry in stream.index_entries), default=0), 0
    elif "avi" in formats:
        end, allowed = _end_of_avi(path), _AVI_TAIL
    else:
        return
    size = path.stat().st_size
    if end - allowed > size:
        raise SourceError(
            f"is cut off: it has {size:,} bytes, and its header speaks of {end:,}",
            where=path,
            hint="`ffmpeg -i INPUT OUTPUT.mp4` keeps what can be saved.",
        )


def _end_of_avi(path: Path) -> int:
    with path.open("rb") as file:
        head = file.read(_RIFF_HEAD)
    # Writers that never came to the end left a size of 0.
    known = len(head) == _RIFF_HEAD and head[:4] == b"RIFF"
    return int.from_bytes(head[4:], "little") + _RIFF_HEAD if known else 0


def picture_of(frame: Any, stream: Any) -> Picture:
    """What the first decoded frame of a stream says of all of them."""
    transposed, flip_y, flip_x = _turn(frame)
    aspect = stream.sample_aspect_ratio  # width of a pixel over its height, as stored
    ratio = float(aspect) if aspect else 1.0
    ratio = ratio if transposed else 1.0 / ratio
    size = frame.width, frame.height
    return Picture(size, transposed, flip_y, flip_x, not frame.interlaced_frame, ratio)


def upright(frame: Any, picture: Picture, reformatter: VideoReformatter) -> NDArray[np.uint8]:
    """A decoded frame as RGB (H W 3) of the first frame's size, turned as the file asks for."""
    width, height = picture.size
    # A stream may change its size midway; like FFmpeg, keep the first.
    rgb: Any = reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
    pixels: NDArray[np.uint8] = rgb.to_ndarray()
    if picture.transposed:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if picture.flip_y else 1, :: -1 if picture.flip_x else 1]


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """(transpose, flip rows, flip columns) of the display matrix, (x, y) -> (ax+cy, bx+dy): libavutil/display.h."""
    for item in frame.side_data:
        if item.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(item), dtype=np.int32)[:5].tolist()
            return (False, d < 0, a < 0) if abs(a) >= abs(c) else (True, b < 0, c < 0)
    return (False, False, False)
