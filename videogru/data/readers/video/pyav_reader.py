"""Video by PyAV: an index from the packets, a seek to the key frame before each wanted frame, and a check of each.

  packets, in decoding order    I0  P3  B1  B2 | I6  B4  B5  P9  ...      (number: when it is shown)
  wanted: 5                     ^ starts here, since I6 shows after 5: B4 and B5 may need frames before I6
  wanted: 9                                      ^ starts here

A frame counts as found only when its time stamp is the one the index promised. Where stamps cannot be trusted
(AVI with B-frames, MPEG streams) or a promise breaks, the whole stream is decoded in order instead. The index of a file
is kept for the next time it is opened (`packet_index.py`); frames are checked against it all the same.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from videogru.data.readers.video.container import MAX_FRAME_PIXELS, picture_of, refuse_cut_off, upright, video_stream
from videogru.data.readers.video.packet_index import (
    Key,
    PacketTable,
    Picture,
    VideoIndex,
    facts_of,
    kept_indexes,
    row_of,
)
from videogru.data.readers.video.seek import BrokenPromise, MaybeHalf, decode_run
from videogru.data.readers.video.timestamps import increasing, spread
from videogru.errors import SourceError
from videogru.kinds import Kind, Unit

MAX_CLIP_BYTES = 4 * 2**30
# Demuxers that guess time stamps, or land anywhere after a seek.
_SEQUENTIAL_FORMATS = {"mpegts", "mpeg", "mpegvideo", "h264", "hevc", "m4v"}
# Lists of other files: a source is one file.
_PLAYLISTS = {"hls", "concat", "dash", "imf", "sdp", "rtsp"}
Result = TypeVar("Result")


class PyavVideo:
    """A `FrameSource` over the best video stream of a file; frames are uint8 RGB (T 3 H W), turned upright.

    Upright: the display matrix is applied, to the nearest quarter turn or mirror. Frames that a decoder marks as
    corrupt do not count as decodable. Where a read falls back to decoding in order and finds other frames than the
    index named, `positions` and `extent` are corrected for the next read.
    """

    kind: Kind = "video"
    unit: Unit = "seconds"

    def __init__(self, path: Path) -> None:
        """Open and index. Raises SourceError where there is no video, no frame, or no way to read it."""
        self.path = path
        self.details: dict[str, object] = {}
        self.positions: NDArray[np.float64] = np.empty(0)
        self.extent = (0.0, 0.0)
        self.pixel_aspect = 1.0
        self._container: Any = None
        # One for all frames: frame.reformat() would set up a converter for each.
        self._reformatter = VideoReformatter()
        self._stream: Any = None
        self._untouched = False  # since it was opened
        self._table: PacketTable | None = None  # None: frames are found by decoding in order
        self._picture: Picture
        self._drains = False
        try:
            self.guard(self._index)
        except SourceError:
            self.close()
            raise

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at increasing `indices` as uint8 (T 3 H W). Raises SourceError where one cannot be decoded."""
        chosen = [int(index) for index in indices]
        if not chosen or any(a >= b for a, b in pairwise(chosen)):
            raise ValueError(f"indices must increase strictly, and be at least one: {chosen}")
        if chosen[0] < 0 or chosen[-1] >= len(self.positions):
            raise ValueError(f"indices {chosen[0]}..{chosen[-1]} are outside 0..{len(self.positions) - 1}")
        if self._container is None:
            raise ValueError(f"{self.path} is closed")
        width, height = self._picture.size
        if len(chosen) * width * height * 3 > MAX_CLIP_BYTES:
            raise SourceError(
                f"{len(chosen)} frames of {width}x{height} need more than {MAX_CLIP_BYTES >> 30} GiB",
                where=self.path,
                hint="Lower data.num_frames, or make the video smaller first.",
            )
        frames = self.guard(lambda: self._read(chosen))
        # Channels last in memory, as decoders give them: nothing is turned around, and resizing takes half the time.
        clip = np.empty((len(frames), *frames[0].shape), np.uint8)
        for step, frame in enumerate(frames):
            clip[step] = frame
        return torch.from_numpy(clip).permute(0, 3, 1, 2)

    def one_by_one(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at increasing `indices` as RGB (H W 3), decoded in one pass over the file, one at a time.

        For who reads most of a long video: nothing is decoded twice, nothing kept. Raises SourceError where one cannot
        be decoded.
        """
        wanted = [int(index) for index in indices]
        # By its time, where the index is trusted; else by its place, as the index was made.
        stamps = None if self._table is None else self._table.stamps
        declared, order, frames = len(self.positions), -1, self._frames_in_order()
        for index in wanted:
            while True:
                frame = self.guard(lambda: next(frames, None))
                order += 1
                if frame is None or (stamps is not None and frame.pts is not None and frame.pts > stamps[index]):
                    raise self._truncated(index, declared, order)
                if order == index if stamps is None else frame.pts == stamps[index]:
                    break
            yield self.guard(lambda frame=frame: self.upright(frame))  # type: ignore[misc]

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
            # Container and streams refer to each other, and hold the decoder (AV1: megabytes a file) until collected.
            gc.collect(1)

    def __enter__(self) -> "PyavVideo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def guard(self, action: Callable[[], Result]) -> Result:
        """The result of `action`; whatever it raises becomes a SourceError."""
        try:
            return action()
        except SourceError:
            raise
        # Damaged files make PyAV raise nearly anything: MemoryError, IndexError, AttributeError.
        except Exception as error:
            raise SourceError(
                f"cannot be read as a video ({type(error).__name__}: {getattr(error, 'strerror', None) or error})",
                where=self.path,
                hint="Check that it plays; `ffmpeg -i INPUT OUTPUT.mp4` re-encodes what can be saved.",
            ) from error

    def _open(self) -> None:
        self.close()
        # Absolute, so that no name is taken for a protocol; and no file may make us open an address.
        options = {"protocol_whitelist": "file", "max_pixels": str(MAX_FRAME_PIXELS)}
        # Titles in an old encoding are no reason to refuse a video.
        self._container = av.open(str(self.path.absolute()), options=options, metadata_errors="replace")
        names = set(self._container.format.name.split(","))
        if names & _PLAYLISTS:
            what = "is a list of other files"
            raise SourceError(what, where=self.path, hint="Give a file that holds the video itself.")
        self._stream = video_stream(self._container, self.path)
        refuse_cut_off(self._container, self._stream, self.path)
        self._untouched = True

    def _index(self) -> None:
        """Open, and look through the packets unless the index of the file, as it is now, was kept."""
        facts = facts_of(self.path)
        self._open()
        steady = facts is not None and facts == facts_of(self.path)
        kept = kept_indexes.find(self.path, facts) if facts is not None and steady else None
        if kept is not None:
            self._table, self._picture, self.positions, self.extent = kept[:4]
            self.details = dict(kept.details)
        else:
            self._make_index()
            if facts is not None and facts == facts_of(self.path):
                details = dict(self.details)
                index = VideoIndex(self._table, self._picture, self.positions, self.extent, details)
                kept_indexes.keep(self.path, facts, index)
        self.pixel_aspect = self._picture.aspect
        # Other codecs have no delay, or may keep the fields of a frame in packets of their own.
        self._drains = self._picture.progressive and self.details["codec"] in ("h264", "hevc")

    def _make_index(self) -> None:
        stream, codec = self._stream, self._stream.codec_context
        first: Any = None
        rows: list[int] = []
        trusted = True
        vp8 = codec.name in ("vp8", "libvpx")
        for packet in self._demux():
            if first is None:
                try:
                    frames = packet.decode()
                except FFmpegError:  # A later packet may begin the stream.
                    frames, trusted = [], False
                first = next((frame for frame in frames if not frame.is_corrupt), None)
                # What a decoder makes of damage depends on all that it had before.
                trusted = trusted and not any(frame.is_corrupt for frame in frames)
            if packet.size == 0 or packet.is_corrupt:
                continue
            if packet.pts is None:
                trusted = False
                continue
            # VP8 keeps frames that are only referred to in packets of their own.
            hidden = vp8 and not bytes(packet)[0] >> 4 & 1
            rows += row_of(packet, shown=not packet.is_discard and not hidden)
        if first is None:
            raise SourceError("not one frame can be decoded", where=self.path, hint="Check that it plays.")
        table = PacketTable.of(rows)
        self._describe(first)
        formats = set(self._container.format.name.split(","))
        if "avi" in formats:  # AVI has no time stamps: FFmpeg makes them up, wrongly for B-frames.
            reordered = codec.has_b_frames or codec.name in ("h264", "hevc")
            trusted = trusted and not reordered and table.in_order
        stamps = table.stamps
        if (
            not trusted
            or formats & _SEQUENTIAL_FORMATS
            or not len(stamps)
            or not np.diff(stamps).all()  # two frames share a time
            or first.pts != stamps[0]  # the first to be shown gave no frame
            or not table.all_have_keys()
        ):
            self._decode_all(set(), set())
            return
        base = stream.time_base
        self._table = table
        self._publish(stamps * base.numerator / base.denominator, table.last_duration)

    def _describe(self, frame: Any) -> None:
        self._picture = picture_of(frame, self._stream)
        width, height = self._picture.size[::-1] if self._picture.transposed else self._picture.size
        self.details |= {
            "codec": self._stream.codec_context.name,
            "format": self._container.format.name,
            "width": width,
            "height": height,
            "rotation_degrees": int(frame.rotation),
            "pixel_aspect": self._picture.aspect,
        }
        if self._stream.frames:
            self.details["declared_frames"] = int(self._stream.frames)

    def _publish(self, positions: NDArray[np.float64], last_duration: int) -> None:
        """Set positions and extent; last_duration in ticks, 0 where unknown."""
        tick = float(self._stream.time_base)
        seconds = last_duration * tick
        if seconds <= 0:
            rate = self._stream.average_rate
            seconds = float(np.median(np.diff(positions))) if len(positions) > 1 else 1 / float(rate) if rate else tick
        self.positions = np.ascontiguousarray(positions, dtype=np.float64)
        self.positions.flags.writeable = False  # it may be kept for others
        self.extent = (float(positions[0]), float(positions[-1]) + seconds)
        self.details["frames"] = len(positions)
        self.details["duration_seconds"] = self.extent[1] - self.extent[0]
        self.details["access"] = "in order" if self._table is None else "by seeking"

    def _read(self, chosen: list[int]) -> list[NDArray[np.uint8]]:
        if self._table is None:
            found: list[NDArray[np.uint8]] = []
            order = -1
            for order, frame in enumerate(self._frames_in_order()):
                if order == chosen[len(found)]:
                    found.append(self.upright(frame))
                    if len(found) == len(chosen):
                        return found
            raise self._truncated(chosen[len(found)], len(self.positions), order + 1)
        try:
            return [frame for run in self._table.runs(chosen) for frame in self._read_run(self._table, *run)]
        except (BrokenPromise, FFmpegError):
            return self._read_in_order(self._table.stamps[chosen].tolist(), chosen)

    def _read_run(self, table: PacketTable, key: Key | None, places: list[int]) -> list[NDArray[np.uint8]]:
        """The frames of the packets at `places`, decoded from a key frame on."""
        if key is None:
            raise BrokenPromise
        self._untouched = False
        # Other codecs do not say in each packet whether another frame refers to it.
        leave_out = self._picture.progressive and self.details["codec"] == "h264"
        run = partial(decode_run, self._container, self._stream, table, key, places, leave_out=leave_out)
        stamps = table.pts[places].tolist()
        try:
            return self._find(run(drain=self._drains), stamps)
        except MaybeHalf:
            self._drains = False
            return self._find(run(drain=False), stamps)

    def _find(self, frames: Iterator[Any], stamps: list[int]) -> list[NDArray[np.uint8]]:
        found = []
        for pts in stamps:
            frame = next((frame for frame in frames if frame.pts >= pts), None)
            if frame is None or frame.pts != pts:
                raise BrokenPromise
            found.append(self.upright(frame))
        return found

    def _read_in_order(self, wanted: list[int], chosen: list[int]) -> list[NDArray[np.uint8]]:
        """The same frames after a broken promise, found by their time stamps in one pass over the whole stream."""
        declared = len(self.positions)
        found, stamps = self._decode_all(set(wanted), set(chosen))
        if increasing(stamps):
            orders = {pts: order for order, pts in enumerate(stamps)}
            taken = [orders.get(pts, -1) for pts in wanted]
        else:  # The stamps are no help; the order is, if no frame is missing.
            taken = chosen if len(stamps) == declared else [-1] * len(chosen)
        missing = [index for index, order in zip(chosen, taken, strict=True) if order not in found]
        if missing:
            raise self._truncated(missing[0], declared, len(stamps))
        return [found[order] for order in taken]

    def _decode_all(
        self, wanted_pts: set[int], wanted_orders: set[int]
    ) -> tuple[dict[int, NDArray[np.uint8]], list[int | None]]:
        """Decode the stream from start to end and index it anew; returns the wanted frames by order, and all stamps.

        Frames that share a stamp are spread until the next. Where stamps are missing or go back, the rate counts.
        """
        found: dict[int, NDArray[np.uint8]] = {}
        stamps: list[int | None] = []
        duration = 0
        for order, frame in enumerate(self._frames_in_order()):
            if order in wanted_orders or frame.pts in wanted_pts:
                found[order] = self.upright(frame)
            stamps.append(frame.pts)
            duration = frame.duration or 0
        if not stamps:
            raise SourceError("not one frame can be decoded", where=self.path, hint="Check that it plays.")
        base, rate = self._stream.time_base, self._stream.average_rate
        if (ticks := spread(stamps)) is not None:
            positions = ticks * base.numerator / base.denominator
            duration = duration if increasing(stamps) else 0
        elif rate:
            start = min((pts for pts in stamps if pts is not None), default=0) * base.numerator / base.denominator
            positions = start + np.arange(len(stamps)) * rate.denominator / rate.numerator
            duration = 0
        else:
            raise SourceError("has neither usable time stamps nor a frame rate", where=self.path, hint="Re-encode it.")
        self._table = None
        self._publish(positions, duration)
        return found, stamps

    def packets(self) -> Iterator[Any]:
        """All packets of the stream from a fresh start, for who decodes the whole of it."""
        if not self._untouched:
            self._open()
        yield from self._demux()

    def _demux(self) -> Iterator[Any]:
        self._untouched = False
        packets: Iterator[Any] = self._container.demux(self._stream)
        return packets

    def _frames_in_order(self) -> Iterator[Any]:
        """All frames that can be decoded, in order of time, from a fresh start; counts the damaged in `details`."""
        damaged = 0
        for packet in self.packets():
            try:
                frames = packet.decode()
            except FFmpegError:
                frames, damaged = [], damaged + 1
            for frame in frames:
                if frame.is_corrupt:
                    damaged += 1
                else:
                    yield frame
            if damaged:
                self.details["damaged_packets"] = damaged

    def _truncated(self, missing: int, declared: int, decodable: int) -> SourceError:
        return SourceError(
            f"declares {declared} frames, {decodable} can be decoded; frame {missing} is not among them",
            where=self.path,
            hint="The file is damaged or cut off; `ffmpeg -i INPUT OUTPUT.mp4` keeps what can be saved.",
        )

    def upright(self, frame: Any) -> NDArray[np.uint8]:
        """A decoded frame as RGB (H W 3) of the first frame's size, turned as the file asks for."""
        return upright(frame, self._picture, self._reformatter)
