"""A folder of numbered images as one video: img_00001.jpg, img_00002.jpg, ...

The numbers give the order and, with a frame rate, the times. A missing number is a lost frame: the one before it goes
on showing.

  files      img_7   img_8          img_10
  positions  0       1/fps          3/fps         extent: 0 to 4/fps
"""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.data.readers.file_types import kind_of_name, numbered_images
from videogru.data.readers.image import open_image
from videogru.data.readers.video.pyav_reader import MAX_CLIP_BYTES
from videogru.errors import SourceError
from videogru.kinds import Kind, Unit

HINT = "A frame folder holds images numbered like img_00001.jpg, all of one pattern, and no folders with media."


class FrameFolder:
    """A `FrameSource` over a folder of numbered images; frames are uint8 RGB (T 3 H W), each read as a still is.

    Positions count from the first number, in seconds at `fps`.
    """

    kind: Kind = "video"
    unit: Unit = "seconds"

    def __init__(self, path: Path, *, fps: float) -> None:
        """List the folder; no image is opened. Raises SourceError where it is no frame folder, or cannot be listed."""
        self.path = path
        self.pixel_aspect = 1.0
        try:
            files, folders = _files_and_folders(path)
            nested = next((name for name in folders if _holds_media(path / name)), None)
        except OSError as error:
            raise SourceError(
                f"cannot be listed ({error.strerror})", where=path, hint="Check the folder and its rights."
            ) from error
        try:
            if nested is not None:
                raise ValueError(f"its folder {nested} holds media of its own")
            self._names, numbers = numbered_images(files)
        except ValueError as error:
            raise SourceError(f"is no frame folder: {error}", where=path, hint=HINT) from error
        first, last = int(numbers[0]), int(numbers[-1])
        self.positions: NDArray[np.float64] = (numbers - first) / fps
        self.extent = (0.0, (last - first + 1) / fps)
        if not (np.diff(self.positions) > 0).all():
            raise SourceError(
                f"its numbers {first} to {last} are too far apart", where=path, hint="Number the frames anew."
            )
        self._open = True
        self.details: dict[str, object] = {
            "format": "frame folder",
            "frames": len(numbers),
            "frames_per_second": fps,
            "duration_seconds": self.extent[1],
            "first_frame": self._names[0],
            "last_frame": self._names[-1],
            "missing_numbers": last - first + 1 - len(numbers),
        }

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at increasing `indices` as uint8 (T 3 H W).

        Raises SourceError naming the image that cannot be read, or two that differ in size.
        """
        chosen = [int(index) for index in indices]
        if not chosen or any(a >= b for a, b in pairwise(chosen)):
            raise ValueError(f"indices must increase strictly, and be at least one: {chosen}")
        if chosen[0] < 0 or chosen[-1] >= len(self._names):
            raise ValueError(f"indices {chosen[0]}..{chosen[-1]} are outside 0..{len(self._names) - 1}")
        if not self._open:
            raise ValueError(f"{self.path} is closed")
        first = self._frame(chosen[0])
        if len(chosen) * first.numel() > MAX_CLIP_BYTES:
            height, width = first.shape[1:]
            raise SourceError(
                f"{len(chosen)} frames of {width}x{height} need more than {MAX_CLIP_BYTES >> 30} GiB",
                where=self.path,
                hint="Lower data.num_frames, or make the images smaller first.",
            )
        clip = torch.empty((len(chosen), *first.shape), dtype=torch.uint8)
        clip[0] = first
        for step, index in enumerate(chosen[1:], start=1):
            frame = self._frame(index)
            if frame.shape != first.shape:
                (height, width), (other_height, other_width) = first.shape[1:], frame.shape[1:]
                raise SourceError(
                    f"{self._names[chosen[0]]} has {width}x{height} pixels, "
                    f"{self._names[index]} {other_width}x{other_height}",
                    where=self.path,
                    hint="The frames of a folder are of one size.",
                )
            clip[step] = frame
        return clip

    def close(self) -> None:
        """No image is held open; may be called twice."""
        self._open = False

    def __enter__(self) -> "FrameFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _frame(self, index: int) -> torch.Tensor:
        with open_image(self.path / self._names[index]) as image:
            return image.read([0])[0]


def open_frame_folder(path: Path, *, fps: float) -> FrameFolder:
    """A folder of numbered images as one video at `fps` frames per second. Raises SourceError, see `FrameFolder`."""
    return FrameFolder(path, fps=fps)


def is_frame_folder(path: Path) -> bool:
    """Whether a path is a folder that `FrameFolder` opens; no image is looked into."""
    if not path.is_dir():
        return False
    try:
        FrameFolder(path, fps=1.0)
    except SourceError:
        return False
    return True


def _files_and_folders(path: Path) -> tuple[list[str], list[str]]:
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                # Path.is_dir, as a link to itself is no folder; DirEntry.is_dir would raise.
                folder = (path / entry.name).is_dir() if entry.is_symlink() else entry.is_dir()
                (folders if folder else files).append(entry.name)
    return files, sorted(folders)


def _holds_media(folder: Path) -> bool:
    """Whether a file of a known kind lies anywhere below; links to folders are not followed."""
    return any(
        kind_of_name(name) is not None and not name.startswith(".") for _, _, names in os.walk(folder) for name in names
    )
