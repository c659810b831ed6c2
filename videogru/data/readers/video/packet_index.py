"""What the packets of a video say, as compact tables, and the tables of files that were opened before.

A table holds every packet by its place in decoding order, and the places of the frames in the order they are shown:

  place     0   1   2   3  | 4   5   6   7          (| key frames, at which decoding can start: 0 and 4)
  shown at  0   3   1   2  | 6   4   5   9          pts, in ticks
  shown     0   2   3   1    5   6   4   7          the places of frame 0, 1, 2, ...

Opening a video that was opened before costs no second pass over its packets, as long as nothing about the file has
changed. The tables of a process have a bound. Once it is reached, nothing more is kept and nothing is thrown out: an
epoch opens every video once, so the least recently used would always be thrown out just before its turn.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_KEPT_BYTES = 64 * 2**20  # of one process: some 6,000 videos of 300 frames
_ENTRY_BYTES = 3000  # of an entry, beside its arrays and its path
_NO_DTS = np.iinfo(np.int64).min
_COLUMNS = 7  # of a row
FileFacts = tuple[int, ...]


class Key(NamedTuple):
    """A key frame: its place in decoding order and its time stamps."""

    place: int
    pts: int
    dts: int | None


def row_of(packet: Any, *, shown: bool) -> tuple[int, ...]:
    """A row of `PacketTable.of` for a packet that has a time stamp; shown: whether a frame comes of it."""
    pos, dts = packet.pos, packet.dts
    return (
        packet.pts,
        _NO_DTS if dts is None else dts,
        -1 if pos is None else pos,
        packet.size,
        packet.duration or 0,
        packet.is_keyframe,
        shown,
    )


@dataclass(frozen=True)
class PacketTable:
    """The packets of a stream in decoding order.

    pts, pos, sizes: (P,) when each shows in ticks, its byte in the file (-1 where unknown), its bytes; keys, key_pts,
    key_dts: (K,) places and times of the key frames; shown: (N,) places of the frames in order of time; last_duration:
    of the last of them in ticks, 0 where unknown; in_order: whether frames are stored in order of time.
    """

    pts: NDArray[np.int64]
    pos: NDArray[np.int64]
    sizes: NDArray[np.int32]
    keys: NDArray[np.int32]
    key_pts: NDArray[np.int64]
    key_dts: NDArray[np.int64]
    shown: NDArray[np.int32]
    last_duration: int
    in_order: bool

    @classmethod
    def of(cls, rows: list[int]) -> "PacketTable":
        """The table of packets; rows: what `row_of` gave for each, one after the other in one list."""
        columns = np.array(rows, np.int64).reshape(-1, _COLUMNS)
        pts, dts, pos, sizes, durations, is_key, is_shown = (column.copy() for column in columns.T)
        keys, shown = np.flatnonzero(is_key), np.flatnonzero(is_shown)
        in_order = bool((np.diff(pts[shown]) >= 0).all())
        shown = shown[np.argsort(pts[shown], kind="stable")]
        last_duration = int(durations[shown[-1]]) if len(shown) else 0
        places = keys.astype(np.int32), pts[keys], dts[keys], shown.astype(np.int32)
        return cls(pts, pos, sizes.astype(np.int32), *places, last_duration, in_order)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    @property
    def stamps(self) -> NDArray[np.int64]:
        """(N,) time stamps of the frames, in ticks and in order; two may be the same."""
        return self.pts[self.shown]

    def all_have_keys(self) -> bool:
        """Whether decoding can start somewhere for every frame."""
        if not len(self.keys):
            return not len(self.shown)
        before = np.searchsorted(self.keys, self.shown, side="right") - 1
        earliest = np.minimum.accumulate(self.key_pts)[before]
        return bool(((before >= 0) & (earliest <= self.stamps)).all())

    def key_before(self, place: int) -> Key | None:
        """The last key frame from which the packet at `place` can be decoded: neither decoded nor shown after it."""
        fitting = np.flatnonzero((self.keys <= place) & (self.key_pts <= self.pts[place]))
        if not len(fitting):
            return None
        number = fitting[-1]
        dts = int(self.key_dts[number])
        return Key(int(self.keys[number]), int(self.key_pts[number]), None if dts == _NO_DTS else dts)

    def runs(self, indices: Sequence[int]) -> Iterator[tuple[Key | None, list[int]]]:
        """What to decode for the frames at increasing `indices`: (key frame to start at, places of its frames).

        Frames share a run unless packets between them can be left out; None: there is no such key frame.
        """
        start: Key | None = None
        places: list[int] = []
        for index in indices:
            place = int(self.shown[index])
            key = self.key_before(place)
            # Where the key frame is the very next packet, going on costs less than a seek.
            if places and key is not None and key.place <= max(places) + 1:
                places.append(place)
                continue
            if places:
                yield start, places
            start, places = key, [place]
        yield start, places

    def place_of(self, packet: Any, expected: int) -> int | None:
        """The place of a packet, None where it is none of these; expected: where it most likely is.

        A packet is told by its bytes, which VP8's hidden frames do not share, and by its time, which differs where an
        edit list shows it twice. Not by its dts: after a seek, Matroska's demuxer may not know it again.
        """
        pts, size = packet.pts, packet.size
        if pts is None:
            return None
        pos = -1 if packet.pos is None else packet.pos
        if (
            expected < len(self.pts)
            and self.pts[expected] == pts
            and self.pos[expected] == pos
            and self.sizes[expected] == size
        ):
            return expected
        found = np.flatnonzero((self.pts == pts) & (self.pos == pos) & (self.sizes == size))
        return int(found[-1]) if len(found) else None


class Picture(NamedTuple):
    """What the first frame says of all.

    size: (width, height) as stored; transposed, flip_y, flip_x: how the display matrix turns it; progressive: it is no
    pair of fields; aspect: height of a pixel over its width, upright.
    """

    size: tuple[int, int]
    transposed: bool
    flip_y: bool
    flip_x: bool
    progressive: bool
    aspect: float


class VideoIndex(NamedTuple):
    """What the first look at a video found.

    packets: None where the video has to be decoded in order; positions: (N,) seconds; extent: of all, with the last
    frame's duration; details: as `FrameSource` has them.
    """

    packets: PacketTable | None
    picture: Picture
    positions: NDArray[np.float64]
    extent: tuple[float, float]
    details: dict[str, object]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.positions.nbytes + (0 if self.packets is None else self.packets.nbytes)


def facts_of(path: Path) -> FileFacts | None:
    """What tells a file from another, or from itself after a change; None where it cannot be looked at."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class KeptIndexes:
    """The indexes of files by their paths, for this process; any thread may use it.

    limit_bytes: of all entries. A video is kept as it was first seen: what a read had to correct is not, so that which
    frames a clip gets does not depend on what else this process has read.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._entries: dict[str, tuple[FileFacts, VideoIndex]] = {}
        self._lock = threading.Lock()
        # A process forked while another thread holds the lock would wait for it forever.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._unlock)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, path: Path, facts: FileFacts) -> VideoIndex | None:
        """The index of the file, if it was kept and the file is as it was then."""
        # By its name too: FFmpeg takes a file's suffix as a hint of its format.
        kept = self._entries.get(str(path.absolute()))
        return kept[1] if kept is not None and kept[0] == facts else None

    def keep(self, path: Path, facts: FileFacts, index: VideoIndex) -> None:
        """Keep an index, in the place of an older one of the same path, if there is room."""
        name = str(path.absolute())
        with self._lock:
            old = self._entries.pop(name, None)
            if old is not None:
                self.used_bytes -= _bytes_of(name, old[1])
            if self.used_bytes + (size := _bytes_of(name, index)) <= self.limit_bytes:
                self._entries[name] = (facts, index)
                self.used_bytes += size

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._entries.clear()
            self.used_bytes = 0

    def _unlock(self) -> None:
        self._lock = threading.Lock()


def _bytes_of(name: str, index: VideoIndex) -> int:
    return index.nbytes + len(name) + _ENTRY_BYTES


kept_indexes = KeptIndexes(MAX_KEPT_BYTES)
