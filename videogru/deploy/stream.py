"""`videogru stream`: a model follows a video as it comes, and says after each frame what it sees so far."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videogru.checkpoint.model_file import ModelCard, find_model
from videogru.config import DataConfig
from videogru.data.clips.pace import Pace
from videogru.data.clips.transforms import prepare_clip
from videogru.data.readers.stream import FrameStream, open_stream
from videogru.deploy.live import NewestFrames
from videogru.deploy.stream_output import LiveLine, RecordWriter, live_line_file
from videogru.errors import ConfigError, Interrupted, SourceError
from videogru.inference.answers import check_writable, newest_of_kind
from videogru.inference.early_exit import known_exits, threshold_for
from videogru.inference.predict import Predictor
from videogru.runtime.export_folder import is_exported, read_export_card
from videogru.sequence import FrameSequence

Say = Callable[[str], None]
_TIMED = 1000  # frames whose times are kept for the median


class StreamClassifier:
    """One model that follows one stream: frames in, one by one, probabilities of the classes out.

    restart_seconds: after so long it forgets what it saw and begins anew. Raises ConfigError where the model reads no
    videos, or needs frames that a stream does not have yet.
    """

    def __init__(self, predictor: Predictor, *, restart_seconds: float | None = None) -> None:
        card = predictor.card
        if card.kind != "video":
            raise ConfigError(f"this model reads {card.kind}s, not videos", hint="Name a video model with --model.")
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


def answer_stream(
    source: str,
    *,
    model: Path | None,
    out: Path | None,
    every_seconds: float | None,
    top_k: int,
    size: tuple[int, int] | None,
    fps: float | None,
    step_seconds: float | None,
    restart_seconds: float | None,
    exit_risk: float | None,
    device: str,
    stdin: BufferedIOBase | None,
    say: Say,
) -> None:
    """Follow a source to its end, write a record per answered frame, and keep one line on the terminal up to date.

    source, size, fps: see `open_stream`; step_seconds: between the frames that are read, default `step_seconds_of`;
    every_seconds: at least so far apart are answers, of which the last frame always is one; exit_risk: reading stops
    where the answer is another than at the end with no larger risk; out: file of the records, None: standard output
    unless it is a terminal. Raises ConfigError, ModelFileError or SourceError on what cannot be
    used, Interrupted after Ctrl-C; what was answered until then is written.
    """
    if out is not None:
        check_writable(out, [source, model])
    chosen = find_model(model) if model is not None else newest_of_kind("video", say)
    classifier = StreamClassifier(Predictor.from_file(chosen, device=device), restart_seconds=restart_seconds)
    if exit_risk is not None:
        check_calibrated(chosen)
    surer_than = None if exit_risk is None else threshold_for(known_exits(classifier.card, chosen), exit_risk)
    stream = open_stream(source, data=classifier.data, stdin=stdin, size=size, fps=fps)
    progress = Progress()
    try:
        if exit_risk is not None:
            check_has_end(stream)
        if step_seconds is None:
            step_seconds = step_seconds_of(classifier.card, classifier.data, stream)
        with (
            RecordWriter(out, classifier.card.classes, every_seconds=every_seconds, top_k=top_k) as writer,
            LiveLine(live_line_file()) as line,
        ):
            how = {"step_seconds": step_seconds, "surer_than": surer_than}
            for seconds, probabilities in follow(stream, classifier, **how, progress=progress):
                exit = None
                if progress.stopped:
                    assert stream.extent is not None
                    left = round(stream.extent[1] - seconds, 6)
                    exit = {"risk": exit_risk, "surer_than": surer_than, "frames": progress.read, "seconds_left": left}
                record = writer.add(seconds, probabilities, dropped=progress.dropped, exit=exit)
                line.show(record, milliseconds=progress.milliseconds[-1])
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted after {progress}") from None
    finally:
        if not (stream.is_live and progress.began):  # else its thread may still be at it
            stream.close()
    if not progress.read:
        raise SourceError(
            "ends before the first frame that is to be read", where=stream.name, hint="Lower --step-seconds."
        )
    say(f"{stream.name}: {progress}")


def check_calibrated(model: Path) -> None:
    """Raises ConfigError for an export that rounds: its confidences are not those that were calibrated."""
    if is_exported(model) and (precision := read_export_card(model).precision) != "fp32":
        raise ConfigError(
            f"--exit-risk was calibrated in float32, and this export computes in {precision}",
            where=model,
            hint="Name the run, or an export in fp32.",
        )


def check_has_end(stream: FrameStream) -> None:
    """Raises ConfigError where nobody knows the end of a stream, so that no answer is the one at its end."""
    if stream.is_live or stream.extent is None:
        raise ConfigError(
            "--exit-risk is about the answer at the end, and this has none that is known",
            where=stream.name,
            hint="Name a file, or leave --exit-risk out.",
        )


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


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of `320x240`. Raises ConfigError on anything else."""
    parts: list[Any] = text.lower().split("x")
    if len(parts) == 2 and all(part.isascii() and part.isdecimal() and 1 <= int(part) <= 2**16 for part in parts):
        return int(parts[0]), int(parts[1])
    raise ConfigError(f"--size {text!r} is no size in pixels", hint="Example: --size 320x240 (width, height)")
