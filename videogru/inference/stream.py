"""A causal model that follows a stream frame by frame."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.checkpoint.model_file import ModelCard
from videogru.config import DataConfig
from videogru.data.clips.pace import Pace
from videogru.data.clips.transforms import prepare_clip
from videogru.data.readers.stream import FrameStream
from videogru.errors import ConfigError, SourceError
from videogru.inference.live_frames import NewestFrames
from videogru.inference.predictor import Predictor
from videogru.kinds import KINDS
from videogru.sequence import FrameSequence

_TIMED = 1000  # frames whose times are kept for the median


class StreamClassifier:
    """One model that follows one stream: frames in, one by one, probabilities of the classes out.

    restart_seconds: after so long it forgets what it saw and begins anew. Raises ConfigError where the model reads no
    videos, or needs frames that a stream does not have yet.
    """

    def __init__(self, predictor: Predictor, *, restart_seconds: float | None = None) -> None:
        card = predictor.card
        record = KINDS[card.kind]
        if not record.has_times:
            raise ConfigError(f"this model reads {record.plural}, not videos", hint="Name a video model with --model.")
        self.card, self.data = card, predictor.data
        self.restart_seconds = restart_seconds
        self._predictor = predictor
        self._fresh = predictor.initial_state(1)
        self.begin()

    def begin(self) -> None:
        """Forget what was seen: the next frame is the first of another video."""
        self._state = self._fresh
        self._began: float | None = None
        self._last = 0.0

    def read(self, pixels: NDArray[np.uint8], seconds: float, *, pixel_aspect: float = 1.0) -> NDArray[np.float64]:
        """(K,) probabilities after one more frame: RGB (H W 3) as the readers give it, which begins at `seconds`.

        pixel_aspect: height of a pixel over its width. Raises SourceError where frames are too long and thin to be
        cropped, or the model gives no finite score.
        """
        gap = seconds - self._last
        if self._began is None or (self.restart_seconds is not None and seconds - self._began >= self.restart_seconds):
            self._state, self._began, gap = self._fresh, seconds, 0.0
        self._last = seconds
        # A copy, as torch knows neither flipped nor read-only arrays; its axes in memory as in the readers' clips.
        frames = torch.from_numpy(np.array(pixels, order="C")[None]).permute(0, 3, 1, 2)
        clip = FrameSequence(frames, torch.tensor([seconds], dtype=torch.float64), "seconds")
        prepared = prepare_clip(clip, data=self.data, pixel_aspect=pixel_aspect).frames
        said, self._state = self._predictor.step(prepared, self._state, torch.tensor([gap], dtype=torch.float32))
        probabilities: NDArray[np.float64] = said[0].numpy()
        if not np.isfinite(probabilities).all():
            raise SourceError(f"the model gives no finite score at {seconds:g} seconds")
        return probabilities


def step_seconds_of(card: ModelCard, data: DataConfig, stream: FrameStream) -> float | None:
    """How far apart a model's steps lay in training, in seconds; None: every frame is a step.

    - data.sampling=all: every frame; dense: data.stride_seconds.
    - random or uniform over windows: their median length with data.context_seconds, over data.num_frames.
    - random or uniform over whole videos: the length of this one over data.num_frames, as `infer` reads it.

    Raises ConfigError in the last case where the length is not known.
    """
    if data.sampling == "all":
        return None
    if data.sampling == "dense":
        return data.stride_seconds
    if card.window_seconds:
        return (statistics.median(card.window_seconds) + 2 * data.context_seconds) / data.num_frames
    if stream.extent is None:
        raise ConfigError(
            f"the model was trained on {data.num_frames} frames of whole videos, and this one has no end that is known",
            where=stream.name,
            hint="Say how far apart the frames lie that it reads, for example: --step-seconds 0.2",
        )
    if stream.count is not None and stream.count <= data.num_frames:
        return None
    return (stream.extent[1] - stream.extent[0]) / data.num_frames


@dataclass
class Progress:
    """What happened so far: whether it began, frames read and dropped, whether the last one was so sure that reading
    stopped, and the milliseconds of the last ones.
    """

    began: bool = False
    read: int = 0
    dropped: int = 0
    stopped: bool = False
    milliseconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED))

    def __str__(self) -> str:
        text = f"{self.read:,} frames read, {self.dropped:,} dropped"
        text += f", {statistics.median(self.milliseconds):.1f} ms a frame" if self.milliseconds else ""
        return f"{text}, stopped before the end" if self.stopped else text


def follow(
    stream: FrameStream,
    classifier: StreamClassifier,
    *,
    step_seconds: float | None,
    progress: Progress,
    surer_than: float | None = None,
) -> Iterator[tuple[float, NDArray[np.float64]]]:
    """(seconds, probabilities) after each frame that was read, to the end. Only what is live drops frames.

    surer_than: a first answer with a larger probability than this is the last; no frame behind it is decoded.
    """
    progress.began = True
    takes = Pace(step_seconds).takes
    with ExitStack() as opened:
        newest = opened.enter_context(NewestFrames(stream, takes)) if stream.is_live else None
        for pixels, seconds in stream.frames(takes) if newest is None else newest:
            began = time.perf_counter()
            try:
                probabilities = classifier.read(pixels, seconds, pixel_aspect=stream.pixel_aspect)
            except SourceError as error:
                raise SourceError(error.what, where=error.where or stream.name, hint=error.hint) from error
            progress.milliseconds.append(1000 * (time.perf_counter() - began))
            progress.read += 1
            progress.dropped = 0 if newest is None else newest.dropped
            progress.stopped = surer_than is not None and bool(probabilities.max() > surer_than)
            yield seconds, probabilities
            if progress.stopped:
                return
