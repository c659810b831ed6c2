"""From a path to a clip: which reader opens it, which steps are read."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import DataConfig, Kind
from videogru.data import sampling
from videogru.data.frames import SUFFIXES, FrameSource, kind_of_name
from videogru.data.image import open_image
from videogru.data.video import open_video
from videogru.data.volume import open_volume
from videogru.errors import SourceError
from videogru.sequence import FrameSequence

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})


def open_source(path: Path | str, *, data: DataConfig, kind: Kind | None = None) -> FrameSource:
    """Open a video, volume or image with the reader its suffix asks for.

    kind: what it has to be; None: any. Raises SourceError where the path is no file with content, is of another kind
    or no known one, or its reader refuses it; ConfigError where `data` asks for a decoder that is not installed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            hint = "A folder of DICOM slices has to be converted to NIfTI first." if _is_dicom_dir(path) else None
            raise SourceError("is a folder, not a file", where=path, hint=hint or "Name the files in it.")
        if not path.exists():
            raise SourceError("no such file", where=path, hint="Check the path; manifests count from their own folder.")
        if not path.is_file():
            raise SourceError("is no regular file", where=path, hint="Name a file on disk.")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(132)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot be opened ({error})", where=path, hint="Check the path and its rights.") from error
    if size == 0:
        raise SourceError("is empty (0 bytes)", where=path, hint="Copy or download it again.")
    if path.suffix.lower() in DICOM_SUFFIXES or head[128:] == b"DICM":
        raise SourceError(
            "is DICOM, which is not supported yet",
            where=path,
            hint="Convert the series to NIfTI, e.g. with: dcm2niix -z y FOLDER",
        )
    found = kind_of_name(path.name)
    if found is None:
        known = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}
        raise SourceError(
            f"has an unknown suffix {path.suffix!r}", where=path, hint="Known are: " + " ".join(sorted(known))
        )
    if kind is not None and found != kind:
        raise SourceError(
            f"is a file of kind {found}, expected {kind}", where=path, hint=f"Give a file of kind {kind}."
        )
    if found == "video":
        return open_video(path, decoder=data.decoder)
    return open_volume(path, data=data) if found == "volume" else open_image(path)


def read_clip(
    source: FrameSource,
    *,
    data: DataConfig,
    draws: NDArray[np.float64] | None = None,
    window: tuple[float, float] | None = None,
) -> FrameSequence:
    """At most `data.num_frames` steps of a source: at segments' centers, or at drawn places of them.

    draws: (num_frames,) in [0, 1), one per segment, or None for the centers. window: [start, end) in seconds on the
    video's own time line, on which its first frame lies at `source.positions[0]` (mostly, but not always, 0); what
    reaches beyond the video is cut off. Raises SourceError on an empty window, or where the steps cannot be read.
    """
    extent = source.extent
    if window is not None:
        if source.unit != "seconds":
            raise SourceError(
                f"start_seconds and end_seconds are for videos, not for a {source.kind}",
                where=source.path,
                hint="Leave the two columns empty.",
            )
        extent = max(window[0], extent[0]), min(window[1], extent[1])
        if not extent[0] < extent[1]:
            raise SourceError(
                f"nothing lies between {window[0]:g} and {window[1]:g} seconds",
                where=source.path,
                hint=f"The video shows from {source.extent[0]:g} to {source.extent[1]:g} seconds.",
            )
    rule: sampling.Rule = "showing" if source.unit == "seconds" else "nearest"
    if draws is None:
        indices = sampling.uniform(positions=source.positions, extent=extent, num_frames=data.num_frames, rule=rule)
    else:
        indices = sampling.random(
            positions=source.positions, extent=extent, num_frames=data.num_frames, draws=draws, rule=rule
        )
    # Before the read, which may correct a broken index.
    positions = torch.from_numpy(source.positions[indices])
    frames = source.read([int(index) for index in indices])
    return FrameSequence(frames, positions, source.unit)


def _is_dicom_dir(folder: Path) -> bool:
    return any(child.suffix.lower() in DICOM_SUFFIXES for child in folder.iterdir())
