"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from videogru.errors import DataError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its name when it is complete; folders above it are made.

    Raises DataError where it cannot be written; whatever stood at `path` is then still there.
    """
    try:
        path = path.resolve()  # through links, so that they stay
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=path) from error


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file, written as `atomic_path` does; a device or pipe is written to, never replaced."""
    # File names need not be valid text.
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    if path.exists() and not path.is_file():
        try:
            with path.open("w", **how) as file:
                yield file
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror or error}", where=path) from error
        return
    with atomic_path(path) as partial, partial.open("w", **how) as file:
        yield file
