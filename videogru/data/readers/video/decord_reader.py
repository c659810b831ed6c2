"""Video by decord: an alternative decoder with known limits.

By itself, decord 0.6 gives wrong frames and says nothing on open groups, intra refresh, most HEVC, cuts by stream copy,
edit lists, MPEG streams and AVI with B-frames, and has no AV1. Here each of these is an error: `open.py` refuses what
has to be decoded in order or has open groups; the number of frames and their time stamps, which decord counts from 0
on, are held against PyAV's. So files that begin later, fragmented MP4 and FLV are refused as well, although their
frames were right. What passed gave no wrong frame over the 79 files of the matrix (docs/video.md); 10-bit colors may
differ a little. It exists for Linux x86-64 only.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.errors import ConfigError, SourceError
from videogru.kinds import Kind, Unit

HINT = "Use data.decoder=pyav."


def load() -> Any:
    """The decord package. Raises ConfigError where it is missing."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"decord cannot be imported ({error}); it exists for Linux x86-64 only",
            where="data.decoder=decord",
            hint=f"pip install decord, or: {HINT}",
        ) from error
    return decord


class DecordVideo:
    """A `FrameSource` over what PyAV has indexed: positions (N,) and extent in seconds; frames are uint8 (T 3 H W)."""

    kind: Kind = "video"
    unit: Unit = "seconds"

    def __init__(
        self,
        path: Path,
        *,
        positions: NDArray[np.float64],
        extent: tuple[float, float],
        pixel_aspect: float,
        details: dict[str, object],
    ) -> None:
        """Open. Raises ConfigError where decord is missing, SourceError where it cannot be trusted with the file."""
        self.path, self.positions, self.extent = path, positions, extent
        self.pixel_aspect, self.details = pixel_aspect, details
        decord = load()
        try:
            self._reader: Any = decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0), num_threads=1)
            count = len(self._reader)
            starts = self._reader.get_frame_timestamp(range(count))[:, 0]
        except Exception as error:
            raise _failed(path, error) from error
        if count != len(positions):
            raise SourceError(f"decord finds {count} frames, PyAV {len(positions)}", where=path, hint=HINT)
        # Of its packets, as are ours; they tell of a shifted index.
        if not np.allclose(starts, positions, rtol=0, atol=1e-3):
            raise SourceError("decord's time stamps are not those of the file", where=path, hint=HINT)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at increasing `indices` as uint8 (T 3 H W). Raises SourceError where one cannot be decoded."""
        chosen = [int(index) for index in indices]
        if self._reader is None:
            raise ValueError(f"{self.path} is closed")
        try:
            frames = torch.from_numpy(self._reader.get_batch(chosen).asnumpy())
        except Exception as error:
            raise _failed(self.path, error) from error
        return frames.permute(0, 3, 1, 2).contiguous()

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        self._reader = None

    def __enter__(self) -> "DecordVideo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _failed(path: Path, error: Exception) -> SourceError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Without the time and place in its source, the file once more, and stray memory.
    plain = re.sub(r"^\[[\d:]+\] \S+:\d+: |\[[^]]*/[^]]*\] | \(-?\d+ vs\. -?\d+\)", "", lines[-1])
    return SourceError(f"decord cannot read it ({plain})", where=path, hint=HINT)
