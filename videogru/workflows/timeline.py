"""`videogru infer --windows`: which videos, which model, and how their timelines are written and drawn."""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videogru.checkpoint.model_file import find_model, read_card
from videogru.config import DataConfig
from videogru.data.clips.read_clip import read_clip
from videogru.data.clips.transforms import prepare_clip
from videogru.data.loading.worker_pool import watched_call
from videogru.data.readers.open import open_source
from videogru.errors import SourceError
from videogru.files import atomic_text
from videogru.inference.predictor import Predictor
from videogru.inference.timeline.figure import FRAMES, draw_timeline, write_picture
from videogru.inference.timeline.timeline import Timeline, read_timeline
from videogru.progress import Progress, Say
from videogru.workflows.predict import check_writable, data_settings, expand, newest_fitting

PICTURES = Path("timelines")
COLUMNS = ("source", "start_seconds", "end_seconds", "predicted", "confidence", "error")


def answer_windows(
    asked: Sequence[str],
    *,
    model: Path | None,
    out: Path | None,
    form: str,
    window_seconds: Sequence[float],
    min_confidence: float,
    device: str,
    settings: Mapping[str, Any],
    progress: bool,
    say: Say,
) -> int:
    """Write the timeline of every video that `asked` names, and a picture of each; returns how many failed.

    One row for each segment, or one with an error, or one without a class where nothing is sure enough. Pictures go
    beside `out`, else into timelines/. Raises what `answers.answer` and `read_timeline` raise.
    """
    if out is not None:
        check_writable(out, [*asked, model])
    chosen = find_model(model) if model is not None else newest_fitting(asked, say)
    card = read_card(chosen)
    predictor = Predictor.from_file(chosen, device=device, data=data_settings(card, settings))
    records: list[dict[str, Any]] = []
    pictures = Pictures(out)
    failed = 0
    for text, problem in expand(asked, card.kind, say):
        try:
            if problem is not None:
                raise SourceError(problem)
            timeline = _watched(predictor, Path(text), window_seconds, min_confidence, progress)
        except SourceError as error:
            failed += 1
            records.append(dict.fromkeys(COLUMNS) | {"source": text, "error": str(error)})
            continue
        records += to_records(text, timeline)
        picture = pictures.path(Path(text))
        try:
            write_picture(picture, draw_timeline(timeline, *_strip(predictor.data, Path(text))))
            told = f"picture {picture}"
        except SourceError as error:  # windows beside the damage were read all the same
            told = f"no picture: {error.what}"
        if timeline.lost:
            lost = f"{timeline.lost} of {len(timeline.windows)} windows cannot be read"
            say(f"{text}: {lost}; the first: {timeline.reason}")
        say(f"{text}: {_count(len(timeline.segments), 'segment')} from {len(timeline.windows)} windows; {told}")
    written = _FORMS[form](records)
    if out is None:
        print(written, end="")
    else:
        with atomic_text(out) as file:
            file.write(written)
        say(f"{len(records)} rows written to {out}")
    if failed:
        say(f"{_count(failed, 'input')} failed{'; the others are done' if len(records) > failed else ''}")
    return failed


class Pictures:
    """Names for the pictures: <stem>.png in `folder`, or beside `out` with its stem in front; none twice."""

    def __init__(self, out: Path | None, folder: Path = PICTURES) -> None:
        self._folder = folder if out is None else out.parent
        self._front = "" if out is None else f"{out.stem}-"
        self._given: set[str] = set()

    def path(self, source: Path) -> Path:
        """Where the picture of a source goes."""
        name, number = f"{self._front}{source.stem}", 2
        stem = name
        while stem in self._given:
            stem, number = f"{name}-{number}", number + 1
        self._given.add(stem)
        return self._folder / f"{stem}.png"


def to_records(source: str, timeline: Timeline) -> list[dict[str, Any]]:
    """One plain record per segment; a single one without a class where there is none."""
    if not timeline.segments:
        return [dict.fromkeys(COLUMNS) | {"source": source}]
    return [
        {
            "source": source,
            "start_seconds": round(segment.start_seconds, 3),
            "end_seconds": round(segment.end_seconds, 3),
            "predicted": segment.label,
            "confidence": segment.confidence,
            "error": None,
        }
        for segment in timeline.segments
    ]


def _watched(
    predictor: Predictor, path: Path, window_seconds: Sequence[float], min_confidence: float, progress: bool
) -> Timeline:
    bar: list[Any] = []

    def tick(done: int, total: int) -> None:
        if not bar:
            shown = Progress(total, shown=progress)
            bar.extend((shown, shown.__enter__()))
        bar[1](done)

    try:
        return read_timeline(predictor, path, window_seconds=window_seconds, min_confidence=min_confidence, tick=tick)
    finally:
        if bar:
            bar[0].__exit__()


def _strip(data: DataConfig, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Frames at even times as squares (T H W 3), and their times; read in a process of their own."""
    shown = {"num_frames": FRAMES, "sampling": "uniform", "frame_size": 128, "channels": 3, "fit": "crop"}
    read = partial(_read_strip, data=data.model_copy(update=shown))
    return watched_call(read, path, timeout_seconds=data.decode_timeout_seconds)


def _read_strip(path: Path, *, data: DataConfig) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    with open_source(path, data=data, kind="video") as source:
        clip = prepare_clip(read_clip(source, data=data), data=data, pixel_aspect=source.pixel_aspect)
    return clip.frames.permute(0, 2, 3, 1).contiguous().numpy(), clip.positions.numpy()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _as_jsonl(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _as_csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        # One line for one row, as line tools expect.
        writer.writerow(record | {"error": record["error"] and " ".join(record["error"].split())})
    return text.getvalue()


def _as_table(records: list[dict[str, Any]]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table("source", "seconds", "class", "probability", box=None, pad_edge=False)
    before = None
    for record in records:
        source = "" if record["source"] == before else record["source"]
        before = record["source"]
        if record["error"]:
            reason = record["error"].removeprefix(f"{record['source']}: ")
            table.add_row(Text(source), "", Text("error: " + reason, style="red"), "")
        elif record["predicted"] is None:
            table.add_row(Text(source), "", Text("nothing sure enough"), "")
        else:
            seconds = f"{record['start_seconds']:.2f} to {record['end_seconds']:.2f}"
            table.add_row(Text(source), seconds, Text(record["predicted"]), f"{record['confidence']:.3f}")
    console = Console() if terminal else Console(width=10_000, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get() if terminal else "".join(line.rstrip() + "\n" for line in captured.get().splitlines())


_FORMS = {"jsonl": _as_jsonl, "csv": _as_csv, "table": _as_table}
