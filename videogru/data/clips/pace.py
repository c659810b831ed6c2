"""Which frames of a stream are read, decided as each one comes: a model wants them as far apart as in training."""

import math


class Pace:
    """Takes the frames that show at the times start + (k + 1/2) * step_seconds, k = 0, 1, ...; start: of the first.

    These are the frames that `sampling.dense` finds with place 0, and `sampling.uniform` with step_seconds = extent /
    num_frames, but without knowing what comes. None takes every frame.

      frames      |-----|-----|-----|-----|-----|-----|-----
      times          ^          ^          ^          ^
      taken       yes   no   yes   no yes  no ...

    A frame that shows at several of these times is taken once; after a gap, the first frame stands for the times in it.
    """

    def __init__(self, step_seconds: float | None) -> None:
        if step_seconds is not None and not (math.isfinite(step_seconds) and step_seconds > 0):
            raise ValueError(f"step_seconds must be above 0, got {step_seconds:g}")
        self.step_seconds = step_seconds
        self._start: float | None = None
        self._next = 0

    def takes(self, begins: float, ends: float) -> bool:
        """Whether to read the frame that shows in [begins, ends) seconds; asked once for each, in order of time."""
        if self.step_seconds is None:
            return True
        if self._start is None:
            self._start = begins
        if self._time(self._next) >= ends:
            return False
        self._next = max(self._next + 1, math.floor((ends - self._start) / self.step_seconds - 0.5))
        while self._time(self._next) < ends:  # rounding, one at most
            self._next += 1
        return True

    def _time(self, k: int) -> float:
        assert self._start is not None and self.step_seconds is not None
        return self._start + (k + 0.5) * self.step_seconds
