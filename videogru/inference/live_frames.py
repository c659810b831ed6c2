"""Frames of a source that does not wait: a thread reads them, and only the newest is kept until it is asked for."""

import threading
from collections.abc import Iterator
from types import TracebackType

from videogru.data.readers.stream import FrameStream
from videogru.data.readers.video.live import StreamFrame, Takes

_JOIN_SECONDS = 2.0


class NewestFrames:
    """The frames that `takes` wants; `dropped` counts those that a newer one replaced before their turn.

    Use it in a `with` block and iterate over it once. What the stream raises is raised here, after the frames that came
    before.
    """

    def __init__(self, stream: FrameStream, takes: Takes) -> None:
        self.dropped = 0
        self._stream, self._takes = stream, takes
        self._newest: StreamFrame | None = None
        self._error: BaseException | None = None
        self._ended = self._stopped = False
        self._changed = threading.Condition()
        # A daemon: a read that waits for the network must not hold the process when it ends.
        self._thread = threading.Thread(target=self._read, name="frames", daemon=True)

    def __enter__(self) -> "NewestFrames":
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[StreamFrame]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ended)
                frame, self._newest = self._newest, None
            if frame is not None:
                yield frame
            elif self._error is not None:
                raise self._error
            else:
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped = True
        self._thread.join(_JOIN_SECONDS)
        # Else it still waits for the source, which must not be closed under its hands.
        if not self._thread.is_alive():
            self._stream.close()

    def _read(self) -> None:
        try:
            for frame in self._stream.frames(self._takes):
                with self._changed:
                    self.dropped += self._newest is not None
                    self._newest = frame
                    self._changed.notify()
                if self._stopped:
                    break
        except BaseException as error:  # noqa: BLE001
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()
