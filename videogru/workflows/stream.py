"""`videogru stream`: a model follows a video as it comes, and says after each frame what it sees so far."""

from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from videogru.checkpoint.model_file import find_model
from videogru.data.readers.stream import FrameStream, open_stream
from videogru.errors import ConfigError, Interrupted, SourceError
from videogru.inference.early_exit import known_exits, threshold_for
from videogru.inference.predictor import Predictor
from videogru.inference.stream import Progress, StreamClassifier, follow, step_seconds_of
from videogru.runtime.export_folder import is_exported, read_export_card
from videogru.workflows.predict import check_writable, newest_of_kind
from videogru.workflows.stream_output import LiveLine, RecordWriter, live_line_file

Say = Callable[[str], None]


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


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of `320x240`. Raises ConfigError on anything else."""
    parts: list[Any] = text.lower().split("x")
    if len(parts) == 2 and all(part.isascii() and part.isdecimal() and 1 <= int(part) <= 2**16 for part in parts):
        return int(parts[0]), int(parts[1])
    raise ConfigError(f"--size {text!r} is no size in pixels", hint="Example: --size 320x240 (width, height)")
