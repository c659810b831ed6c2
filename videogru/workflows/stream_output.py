"""What `videogru stream` writes: a record per answered frame, and one line on the terminal that is always new."""

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from videogru.errors import DataError

_LINE_SECONDS = 0.1  # between two versions of the line; faster, no eye could read it


class RecordWriter:
    """JSON lines to `out`, to standard output where that is no terminal, or nowhere. Each line is written at once.

    A record has seconds (when the frame began), predicted, confidence, top (list of class and probability), dropped
    (frames so far that the model was too slow for) and, where reading stopped at it, exit. every_seconds: frames
    between answers give no record, but the last of all does when this closes. Raises DataError where it cannot be
    written.
    """

    def __init__(self, out: Path | None, classes: tuple[str, ...], *, every_seconds: float | None, top_k: int) -> None:
        self._out, self._classes, self._top_k = out, classes, min(top_k, len(classes))
        self._every, self._due = every_seconds, -float("inf")
        self._file: TextIO | None = None
        self._held: dict[str, Any] | None = None

    def __enter__(self) -> "RecordWriter":
        try:
            if self._out is not None:
                # File names and classes need not be valid text.
                self._file = self._out.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            elif not sys.stdout.isatty():
                self._file = sys.stdout
        except OSError as error:
            raise self._failed(error) from error
        return self

    def add(
        self, seconds: float, probabilities: NDArray[np.float64], *, dropped: int, exit: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The record of a frame (K,), written if it is time for one; exit: what it says of having stopped there."""
        order = np.argsort(-probabilities, kind="stable")[: self._top_k]
        top = [{"class": self._classes[k], "probability": round(float(probabilities[k]), 6)} for k in order]
        best = top[0]
        self._held = {
            **{"seconds": round(seconds, 6), "predicted": best["class"], "confidence": best["probability"]},
            **{"top": top, "dropped": dropped},
            **({} if exit is None else {"exit": exit}),
        }
        record = self._held
        if self._every is None:
            self._write()
        elif seconds >= self._due - 1e-9:
            self._due = (seconds if self._due == -float("inf") else self._due) + self._every
            self._due = max(self._due, seconds + self._every / 2)  # after a gap, not all that fell into it
            self._write()
        return record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._write()
        finally:
            if self._file is not None and self._file is not sys.stdout:
                with contextlib.suppress(OSError):  # of what a write that failed left behind; all else was flushed
                    self._file.close()

    def _write(self) -> None:
        record, self._held = self._held, None
        if self._file is None or record is None:
            return
        try:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"cannot be written: {error.strerror or error}", where=self._out or "standard output")


def live_line_file() -> TextIO | None:
    """Where the line goes: a terminal (records never go to one), None where there is none."""
    if sys.stdout.isatty():
        return sys.stdout
    return sys.stderr if sys.stderr.isatty() else None


class LiveLine:
    """One line that is written over and over: class, confidence, milliseconds per frame, dropped frames, time."""

    def __init__(self, file: Any) -> None:
        """file: opened for text, or None."""
        self._file, self._last, self._text = file, -float("inf"), ""

    def __enter__(self) -> "LiveLine":
        return self

    def show(self, record: dict[str, Any], *, milliseconds: float) -> None:
        """The newest answer; not every one is drawn, the last always is."""
        self._text = (
            f"{record['seconds']:.2f} s  {record['predicted']}  {record['confidence']:.3f}  "
            f"{milliseconds:.1f} ms  dropped {record['dropped']}"
        )
        if "exit" in record:
            self._text += f"  stopped, {record['exit']['seconds_left']:.2f} s left"
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._draw()
            self._last = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None and self._text:
            self._draw()
            print(file=self._file, flush=True)

    def _draw(self) -> None:
        if self._file is None:
            return
        width = shutil.get_terminal_size().columns - 1
        # What a class name holds must not move the cursor.
        plain = "".join(letter if letter.isprintable() else "?" for letter in self._text)[:width]
        self._file.write("\r" + plain + "\x1b[K")
        self._file.flush()
