"""Video by decord: an alternative decoder with known limits.

decord 0.6 hangs on MPEG-TS (`video.py` refuses it), has no AV1, shades 10-bit video wrongly, and gives wrong frames on
open GOPs, stream-copied cuts and AVI with B-frames. Where its count or time stamps show it, that is an error; it also
counts time from 0, so files that begin elsewhere are refused. It exists for Linux x86-64 only.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import Kind
from videogru.errors import ConfigError, SourceError
from videogru.sequence import Unit

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
        except Exception as error:
            raise _failed(path, error) from error
        if count != len(positions):
            raise SourceError(f"decord finds {count} frames, PyAV {len(positions)}", where=path, hint=HINT)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at increasing `indices` as uint8 (T 3 H W). Raises SourceError where one is not the one promised."""
        chosen = [int(index) for index in indices]
        if self._reader is None:
            raise ValueError(f"{self.path} is closed")
        try:
            # decord reads its time stamps from the same packets; they tell of a shifted index.
            starts = self._reader.get_frame_timestamp(chosen)[:, 0]
            frames = torch.from_numpy(self._reader.get_batch(chosen).asnumpy())
        except Exception as error:
            raise _failed(self.path, error) from error
        if not np.allclose(starts, self.positions[chosen], rtol=0, atol=1e-3):
            raise SourceError("decord's time stamps are not those of the file", where=self.path, hint=HINT)
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
    lines = str(error).strip().splitlines()
    return SourceError(f"decord cannot read it ({lines[-1] if lines else type(error).__name__})", where=path, hint=HINT)
