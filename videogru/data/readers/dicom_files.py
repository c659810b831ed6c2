"""Which files and folders are DICOM, by their names and first bytes alone."""

import os
from collections.abc import Iterable
from pathlib import Path

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_MAGIC_AT, _MAGIC = 128, b"DICM"  # DICOM PS3.10, section 7.1
_LOOKED_INTO = 16


def is_dicom_name(name: str) -> bool:
    """Whether a suffix says DICOM."""
    return not name.startswith(".") and _suffix(name) in DICOM_SUFFIXES


def may_be_dicom_name(name: str) -> bool:
    """Whether a name says nothing: no suffix (IM0001), or only a number as the last part of a UID has (1.2.840.7)."""
    suffix = _suffix(name)[1:]
    return not name.startswith(".") and (not suffix or suffix.isdigit())


def has_magic(head: bytes) -> bool:
    """Whether the first 132 bytes of a file are those of a DICOM file."""
    return head[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


def head_of(path: Path) -> bytes:
    """The first 132 bytes. Raises OSError."""
    with path.open("rb") as file:
        return file.read(_MAGIC_AT + len(_MAGIC))


def holds_dicom(folder: Path, names: Iterable[str] | None = None) -> bool:
    """Whether DICOM files lie directly in a folder: by suffix, else the first 16 nameless ones are looked into.

    names: of the folder's files, where they are known. What cannot be listed or opened holds none.
    """
    try:
        if names is None:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if _is_file(entry)]
        names = list(names)
    except OSError:
        return False
    if any(map(is_dicom_name, names)):
        return True
    return any(_is_dicom_file(folder / name) for name in sorted(filter(may_be_dicom_name, names))[:_LOOKED_INTO])


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself, which says nothing about the files beside it
        return False


def _is_dicom_file(path: Path) -> bool:
    try:
        # To open a pipe would wait for who writes into it.
        return path.is_file() and has_magic(head_of(path))
    except OSError:
        return False


def _suffix(name: str) -> str:
    # As PurePath.suffix has it, which is slow.
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() if stem else ""
