"""Decodes a whole video once, in order: what a check needs to know, and no frame that it keeps in memory."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.error import FFmpegError
from numpy.typing import NDArray

from videogru.data.readers.video.pyav_reader import PyavVideo
from videogru.errors import SourceError


@dataclass(frozen=True)
class WholeVideo:
    """What decoding every packet gave, beside what the index had promised.

    promised, decoded: frames; declared: by the container, or None; damaged: packets and frames that the
    decoder refused; kept: results of `keep` at the wanted frames; pixel_hash: of all decoded pixels.
    """

    positions: NDArray[np.float64]
    extent: tuple[float, float]
    details: dict[str, object]
    decoded: int
    damaged: int
    kept: list[Any]
    pixel_hash: str

    @property
    def promised(self) -> int:
        """Frames of the index."""
        return len(self.positions)

    @property
    def declared(self) -> int | None:
        """Frames that the container claims."""
        found = self.details.get("declared_frames")
        return found if isinstance(found, int) else None


def decode_whole(
    path: Path,
    *,
    wanted: Callable[[NDArray[np.float64], tuple[float, float]], NDArray[np.int64]],
    keep: Callable[[torch.Tensor], Any],
) -> WholeVideo:
    """Decode all of a video. wanted: from positions and extent to the frames that `keep` gets, as uint8 (1 3 H W).

    Raises SourceError where it cannot be opened or not one frame can be decoded.
    """
    with PyavVideo(path) as video:
        indices = wanted(video.positions, video.extent)
        turned = f"{video.details['width']}x{video.details['height']} {video.details['rotation_degrees']}"
        digest = hashlib.blake2b(turned.encode(), digest_size=16)
        kept: list[Any] = []
        decoded = damaged = 0

        def decode() -> None:
            nonlocal decoded, damaged
            for packet in video.packets():
                try:
                    frames = packet.decode()
                except FFmpegError:
                    damaged += 1
                    continue
                for frame in frames:
                    if frame.is_corrupt:
                        damaged += 1
                        continue
                    digest.update(_stored(frame, video))
                    while len(kept) < len(indices) and indices[len(kept)] == decoded:
                        picture = np.ascontiguousarray(video.upright(frame))
                        kept.append(keep(torch.from_numpy(picture).permute(2, 0, 1)[None]))
                    decoded += 1

        video.guard(decode)
        if not decoded:
            raise SourceError("not one frame can be decoded", where=path, hint="Check that it plays.")
        details = dict(video.details)
        return WholeVideo(video.positions, video.extent, details, decoded, damaged, kept, digest.hexdigest())


def _stored(frame: Any, video: PyavVideo) -> Any:
    """The pixels as the codec gives them, without the padding of its lines; RGB where PyAV has no array for them."""
    try:
        return np.ascontiguousarray(frame.to_ndarray()).data
    except ValueError:
        return np.ascontiguousarray(video.upright(frame)).data
