"""Reads one source to its end and says what it is: the work of a check's processes."""

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.config import DataConfig
from videogru.data.readers.open import open_source
from videogru.data.readers.source import FrameSource
from videogru.data.readers.video.full_decode import WholeVideo, decode_whole
from videogru.data_check.perceptual_hash import places, signatures, small_gray
from videogru.data_check.results import HASH_BYTES, Record
from videogru.errors import SourceError
from videogru.kinds import Kind

_CHUNK_BYTES = 1 << 20
_CHUNK_STEPS = 16
# Steps between frames that differ by less than this count as equal: containers round to milliseconds.
_SAME_STEP_SECONDS = 0.0021


def inspect_source(source: str, *, root: Path, kind: Kind, data: DataConfig) -> Record:
    """Decode all of a source. Never raises for what the source is: that stands in the record."""
    path = root / source
    try:
        source.encode()
    except UnicodeEncodeError:
        return Record(source=source, status="bad", reason="its name is no valid text: rename it")
    try:
        before = file_facts(path)
        if not (path.is_file() or path.is_dir()):
            # To open a pipe would wait for who writes into it.
            return Record(source=source, status="bad", reason="is no regular file")
        facts: dict[str, Any] = {"bytes": before[0], "mtime_ns": before[1], "file_hash": _file_hash(path)}
    except FileNotFoundError:
        return Record(source=source, status="missing", reason="no such file")
    except OSError as error:
        return Record(source=source, status="unread", reason=f"cannot be opened: {error.strerror or error}")
    try:
        video = kind == "video" and path.is_file()
        # First as training opens it: that is what refuses files of another kind.
        with open_source(path, data=data, kind=kind) as opened:
            if not video:
                facts |= _read_whole(opened)
            elif data.decoder not in ("auto", "pyav"):
                opened.read(np.unique(places(opened.positions, opened.extent)).tolist())
        if video:
            whole = decode_whole(path, wanted=places, keep=small_gray)
            facts |= _video_facts(whole)
            _refuse_lost_frames(whole, path)
    except SourceError as error:
        return Record(source=source, status="bad", reason=" ".join(error.what.split()), **facts)
    if file_facts(path) != before:
        return Record(source=source, status="unread", reason="was changed while it was read")
    return Record(source=source, status="ok", **facts)


def file_facts(path: Path) -> tuple[int, int]:
    """(bytes, mtime_ns) by which a change is seen; of a folder the sum and the newest of its files. Raises OSError."""
    if not path.is_dir():
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    with os.scandir(path) as entries:
        inside = [entry.stat() for entry in entries if entry.is_file()]
    stamps = [found.st_mtime_ns for found in inside]
    return sum(found.st_size for found in inside), max(stamps, default=path.stat().st_mtime_ns)


def _file_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]:
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _refuse_lost_frames(whole: WholeVideo, path: Path) -> None:
    if whole.decoded < whole.promised:
        raise SourceError(f"has {whole.promised} frames, {whole.decoded} can be decoded", where=path)
    if whole.damaged:
        raise SourceError(f"{whole.damaged} frames are damaged, {whole.decoded} can be decoded", where=path)


def _video_facts(whole: WholeVideo) -> dict[str, Any]:
    details, steps = whole.details, np.diff(whole.positions)
    step = float(np.median(steps)) if len(steps) else 0.0
    same = not len(steps) or float(np.abs(steps - step).max()) <= max(_SAME_STEP_SECONDS, 0.01 * step)
    # Where all steps are the same but for rounding, their mean is nearest to the truth.
    step = float(steps.mean()) if same and len(steps) else step
    wanted = places(whole.positions, whole.extent)
    return {
        "frames": whole.decoded,
        "declared_frames": whole.declared,
        "start_seconds": float(whole.positions[0]),
        "seconds": whole.extent[1] - whole.extent[0],
        "fps": 1 / step if step else None,
        "rate": "constant" if same else "variable",
        "width": details["width"],
        "height": details["height"],
        "format": str(details["format"]).split(",")[0],
        "codec": details["codec"],
        "rotation_degrees": details["rotation_degrees"],
        "pixel_hash": whole.pixel_hash,
        # Of a video that lost frames there may be fewer pictures than wanted.
        "signature": packed_signature(np.concatenate(whole.kept)) if len(whole.kept) == len(wanted) else "",
    }


def _read_whole(source: FrameSource) -> dict[str, Any]:
    """Facts of a source that reads any steps at the same cost, a few at a time."""
    positions = source.positions
    wanted = places(positions, source.extent)
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    pictures: dict[int, NDArray[np.float32]] = {}
    shape: tuple[int, ...] = ()
    for first, frames in _in_chunks(source):
        if not shape:
            shape = tuple(frames.shape[1:])
            digest.update(str((len(positions), shape)).encode())
        digest.update(np.ascontiguousarray(frames.numpy()).data)
        for index in {int(i) for i in wanted if first <= i < first + len(frames)}:
            pictures[index] = small_gray(frames[index - first : index - first + 1])
    details = source.details
    spacing = details.get("spacing_mm_ras")
    facts: dict[str, Any] = {
        "frames": len(positions),
        "width": shape[2],
        "height": shape[1],
        "format": str(details.get("format", "")),
        "codec": str(details.get("dtype") or details.get("mode") or details.get("codec") or ""),
        "spacing_mm": " x ".join(f"{side:g}" for side in spacing) if isinstance(spacing, list) else "",
        "orientation": str(details.get("orientation", "")),
        "pixel_hash": digest.hexdigest(),
        "signature": packed_signature(np.concatenate([pictures[int(index)] for index in wanted])),
    }
    if source.unit == "seconds":
        facts |= {"start_seconds": source.extent[0], "seconds": source.extent[1] - source.extent[0]}
    return facts


def _in_chunks(source: FrameSource) -> Iterator[tuple[int, torch.Tensor]]:
    for first in range(0, len(source.positions), _CHUNK_STEPS):
        yield first, source.read(range(first, min(first + _CHUNK_STEPS, len(source.positions))))


def packed_signature(pictures: NDArray[np.float32]) -> str:
    """The signature of one source's pictures (T 32 32) as text; '' where they show nothing."""
    found = signatures(pictures[None])[0]
    return base64.b64encode(found.tobytes()).decode() if found.any() else ""
