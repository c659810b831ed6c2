"""Video by torchcodec: the fastest decoder where the system has FFmpeg's libraries; an optional extra.

By itself, in exact mode, torchcodec 0.17 gives wrong frames and says nothing on intra refresh, some cuts by stream copy
from open groups, repeated time stamps, MPEG-2 in MPEG-TS, MPEG-1 and H.264 in AVI. Here `open.py` refuses what has to
be decoded in order; each read's time stamps are held against PyAV's, and on the first two of these kinds some reads are
errors, others right. No frame was wrong over the 79 files of the matrix (docs/video.md). Which reads fail cannot be
told from the file without decoding it; colors of 10-bit video may differ a little.
"""

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
    """Torchcodec's decoders. Raises ConfigError where the package or FFmpeg's libraries are missing."""
    try:
        import torchcodec.decoders as decoders
    # Without FFmpeg's libraries the import ends in RuntimeError or OSError.
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"torchcodec cannot be imported ({str(error).strip().splitlines()[0]})",
            where="data.decoder=torchcodec",
            hint=f'pip install "videogru[torchcodec]", and install FFmpeg (4 to 8) with its libraries, or: {HINT}',
        ) from error
    return decoders


class TorchcodecVideo:
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
        """Open. Raises ConfigError where torchcodec does not work here, SourceError where it cannot read the file."""
        self.path, self.positions, self.extent = path, positions, extent
        self.pixel_aspect, self.details = pixel_aspect, details
        decoders = load()
        try:
            self._reader: Any = decoders.VideoDecoder(str(path.absolute()), seek_mode="exact", num_ffmpeg_threads=1)
            count = len(self._reader)
        except Exception as error:
            raise _failed(path, error) from error
        if count != len(positions):
            raise SourceError(f"torchcodec finds {count} frames, PyAV {len(positions)}", where=path, hint=HINT)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at increasing `indices` as uint8 (T 3 H W). Raises SourceError where one is not the one promised."""
        chosen = [int(index) for index in indices]
        if self._reader is None:
            raise ValueError(f"{self.path} is closed")
        try:
            batch = self._reader.get_frames_at(indices=chosen)
        except Exception as error:
            raise _failed(self.path, error) from error
        if not np.allclose(batch.pts_seconds.numpy(), self.positions[chosen], rtol=0, atol=1e-3):
            raise SourceError("torchcodec's time stamps are not those of the file", where=self.path, hint=HINT)
        frames: torch.Tensor = batch.data
        return frames.contiguous()

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        self._reader = None

    def __enter__(self) -> "TorchcodecVideo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _failed(path: Path, error: Exception) -> SourceError:
    lines = str(error).strip().splitlines()
    return SourceError(
        f"torchcodec cannot read it ({lines[0] if lines else type(error).__name__})", where=path, hint=HINT
    )
