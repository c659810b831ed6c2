"""From a path to a clip: which reader opens it, which steps are read."""

from pathlib import Path

from videogru.config import DataConfig
from videogru.data.readers.dicom_files import has_magic, holds_dicom, is_dicom_name
from videogru.data.readers.file_types import SUFFIXES, kind_of_name
from videogru.data.readers.image import open_image
from videogru.data.readers.source import FrameSource
from videogru.data.readers.video.frame_folder import open_frame_folder
from videogru.data.readers.video.open import open_video
from videogru.data.readers.volume.dicom import read_dicom
from videogru.data.readers.volume.volume import Volume, open_volume, volume_of
from videogru.errors import SourceError
from videogru.kinds import Kind


def open_source(path: Path | str, *, data: DataConfig, kind: Kind | None = None) -> FrameSource:
    """Open a video, volume or image with the reader its suffix asks for.

    A folder of DICOM files is a volume, a folder of numbered images a video; DICOM files are also known by their mark.

    kind: what it has to be; None: any. Raises SourceError where the path is no file with content, is of another kind
    or no known one, or its reader refuses it; ConfigError where `data` asks for a decoder that is not installed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_dicom(path, data, kind) if holds_dicom(path) else _open_folder(path, data, kind)
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
    if is_dicom_name(path.name) or has_magic(head):
        return _open_dicom(path, data, kind)
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


def _open_dicom(path: Path, data: DataConfig, kind: Kind | None) -> Volume:
    if kind not in (None, "volume"):
        raise SourceError(f"is DICOM, a volume, expected {kind}", where=path, hint=f"Give a file of kind {kind}.")
    scan = read_dicom(path, data=data)
    try:
        return volume_of(scan, path=path, data=data)
    except ValueError as error:
        raise SourceError(f"cannot be read as a volume ({error})", where=path, hint="Leave it out.") from error


def _open_folder(path: Path, data: DataConfig, kind: Kind | None) -> FrameSource:
    try:
        source = open_frame_folder(path, fps=data.folder_fps)
    except SourceError as error:
        raise SourceError(f"is a folder, not a file, and {error.what}", where=path, hint=error.hint) from error
    if kind not in (None, "video"):
        raise SourceError(
            f"is a folder of frames, which is a video, expected {kind}", where=path, hint=f"Give a file of kind {kind}."
        )
    return source
